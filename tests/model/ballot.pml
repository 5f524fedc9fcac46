/*
 * The ballot for one lease: acquire, commit, release, crash, restart, writes that land late.
 *
 * Section numbers are those of docs/paxos-format.md. docs/model.md says what is left out and why.
 *
 * Storage      One leader sector and one sector per host. Reading or writing a sector is one atomic step; an area is
 *              read sector by sector, so others move in between. A host may stand still between any two steps.
 * Late writes  A write may time out (TIMEOUTS of them in all). It then lands, or is lost, at any later moment, but
 *              before its host is declared dead: the watchdog and the delay of 8T+W see to that (live.pml). The host
 *              itself waits for the end of its late write.
 * Liveness     Abstract. A crashed host seems alive to others, and counts as owner of what it owned, until it is
 *              declared dead. A host that comes back has one generation more.
 * Bounds       HOSTS hosts; lease versions up to LVERS; ballot numbers up to MBALS (a host that needs more stands
 *              still); ACQUIRES attempts per host; CRASHES and TIMEOUTS in all. SHARED adds shared leases, without
 *              conversion.
 *
 * Properties, all assertions: `won` always; with VERSIONS also `learned` and `landed_leader`; with QUIET `quiet`.
 *
 * BROKEN_... selects a variant that lacks one step; each must be caught. SPARED_... lacks a step whose absence does no
 * harm within the bounds.
 */

#ifndef HOSTS
#define HOSTS 2
#endif
#ifndef LVERS
#define LVERS 2
#endif
#ifndef MBALS
#define MBALS 8
#endif
#ifndef ACQUIRES
#define ACQUIRES 2
#endif
#ifndef CRASHES
#define CRASHES 1
#endif
#ifndef TIMEOUTS
#define TIMEOUTS 1
#endif

/* --- records, packed: comparing two of them compares every byte */

/* value: who shall own a version: host in 2 bits, generation in 2, timestamp (the number of the attempt, 0: free) in 2 */
#define VALUE(h, g, t)   ((h) | ((g) << 2) | ((t) << 4))
#define V_HOST(v)        ((v) & 3)
#define V_GEN(v)         (((v) >> 2) & 3)
#define V_OWNER(v)       ((v) & 15)

/* leader: lver 3 bits, value 6, write_id 2 */
#define LEADER(l, v, w)  ((l) | ((v) << 3) | ((w) << 9))
#define L_LVER(r)        ((r) & 7)
#define L_VALUE(r)       (((r) >> 3) & 63)
#define L_OWNED(r)       (((r) >> 7) & 3)
#define L_WRITER(r)      (((r) >> 9) & 3)

/* own sector: mbal 5 bits, bal 5, value (inp, inp2, inp3) 6, lver 3, RELEASED 1, mode block SHARED 1 and generation 2 */
#define BLOCK(m, b, v, l) ((m) | ((b) << 5) | ((v) << 10) | ((l) << 16))
#define B_MBAL(r)        ((r) & 31)
#define B_BAL(r)         (((r) >> 5) & 31)
#define B_INP(r)         (((r) >> 10) & 63)
#define B_LVER(r)        (((r) >> 16) & 7)
#define RELEASED         (1 << 19)
#define MODE(g)          ((1 << 20) | ((g) << 21))
#define B_RELEASED(r)    (((r) >> 19) & 1)
#define B_SHARED(r)      (((r) >> 20) & 1)
#define B_MODE_GEN(r)    (((r) >> 21) & 3)

/* --- the storage */

int leader;
int block[HOSTS + 1];

/* --- a host. Only what it remembers between two steps; zeroed where it is of no further use */

#define IDLE      0
#define READ      1   /* 12.1, leader */
#define MAXIMUM   2   /* 12.1, dblocks */
#define LIVENESS  3   /* 12.2.1 */
#define REL       4   /* 12.2.1 step 5 */
#define REREAD    5   /* 12.3 steps 1 to 3 */
#define PHASE1    6   /* 12.4 */
#define SCAN1     7
#define PHASE2    8
#define SCAN2     9
#define COMMIT    10  /* 12.3 step 5 */
#define OTHERS    11  /* 14, exclusive over shared ones */
#define HELD      12
#define CHECK     13  /* 13 step 3 */
#define FREE      14  /* 13 step 4 */
#define SHARE     15  /* 14 */
#define SHARING   16
#define UNDO      17  /* 15 */
#define UNDO_READ 18
#define UNDO_FREE 19
#define STUCK     20  /* out of bounds of the model: stands still */
#define CRASHED   21  /* others still think it alive */
#define DEAD      22

typedef Host {
    byte pc;
    byte gen;
    byte tries;
    int  cur;         /* the leader as read in 12.1; as committed, once held */
    byte mbal;
    byte at;          /* next sector of a scan */
    byte best;        /* largest bal seen in phase 1 */
    byte value;       /* what phase 2 proposes */
    int  kept;        /* own dblock as last written */
    bit  shared;      /* wants it shared */
    byte sharers;     /* mask of hosts seen SHARED */
    byte pending;     /* 0, or 1: its late write goes to its own sector, 2: to the leader */
    int  late;        /* that write */
    bit  marks;       /* this attempt has written the own sector, and so dropped its RELEASED mark */
};
Host h[HOSTS + 1];

byte crashes = CRASHES;
byte timeouts = TIMEOUTS;

/* --- what only the properties see */

byte use[HOSTS + 1];          /* 0 no, 1 exclusive, 2 shared: from acquired to released or fenced */
byte owner_of[LVERS + 2];     /* who has learned that it owns that version */
byte committed[LVERS + 2];    /* what a leader with that version said */

#define ALIVE(q)   (h[q].pc != DEAD)
#define SEEN_ALIVE(q, g) (ALIVE(q) && h[q].gen == (g))
#ifdef BROKEN_NO_DEAD_DELAY
#undef ALIVE
#define ALIVE(q)   (h[q].pc < CRASHED)
#endif

#define ME    VALUE(id, h[id].gen, h[id].tries)
#define MINE(v) (V_OWNER(v) == V_OWNER(ME))  /* this life's, whichever attempt's */
#ifdef BROKEN_EARLIER_ATTEMPT_CLAIMED
#define WON(v)  MINE(v)
#else
#define WON(v)  ((v) == ME)
#endif

/* The own dblock as 13 and 15 leave it. A value proposed for another host stays: it may be the only copy. */
inline marked(r) {
    r = h[id].kept | RELEASED;
#ifdef BROKEN_NO_RELEASED_MARK
    r = h[id].kept;
#endif
#ifdef BROKEN_BLOCK_ZEROED
    if
    :: V_HOST(B_INP(r)) != 0 && V_HOST(B_INP(r)) != id -> r = 0
    :: else
    fi
#endif
}

#define NEXT  (L_LVER(h[id].cur) + 1)

byte i;  /* of loops inside one step; 0 between steps */

/* At most one owner uses the lease at a time, and nobody else ever owns the same version. */
inline won(kind) {
    i = 1;
    do
    :: i > HOSTS -> break
    :: else ->
        assert(i == id || use[i] == 0 || (kind == 2 && use[i] == 2));
        i++
    od;
    i = 0;
    use[id] = kind
}

inline learned() {
    skip;
#ifdef VERSIONS
    assert(owner_of[NEXT] == 0 || owner_of[NEXT] == ME);
    owner_of[NEXT] = ME
#endif
}

/* A version that was committed to one owner is never committed to another. */
inline landed_leader(record) {
    leader = record;
#ifdef VERSIONS
    if
    :: L_OWNED(record) ->
        assert(committed[L_LVER(record)] == 0 || committed[L_LVER(record)] == L_VALUE(record));
        committed[L_LVER(record)] = L_VALUE(record)
    :: else
    fi
#endif
}

inline forget(q) {
    h[q].cur = 0; h[q].mbal = 0; h[q].at = 0; h[q].best = 0; h[q].value = 0;
    h[q].sharers = 0; h[q].shared = 0; h[q].marks = 0
}

inline done() { forget(id); h[id].pc = IDLE }

/* 15, after any attempt that wrote the own sector: others may yet commit a version to us that we shall not use. */
inline give_up() {
    if
#ifdef BROKEN_LOST_ATTEMPT_UNMARKED
    :: h[id].pc = IDLE
#else
    :: h[id].marks -> h[id].pc = UNDO
    :: !h[id].marks -> h[id].pc = IDLE
#endif
    fi;
    forget(id)
}

/* One write of the own sector. Either it is done, or it times out and is undone (15). */
inline write_block(record, then) {
    if
    :: block[id] = record; h[id].pc = then
    :: timeouts > 0 && h[id].pending == 0 ->
        timeouts--; h[id].pending = 1; h[id].late = record; h[id].pc = UNDO
    fi
}

/* 12.3 step 4: a lost ballot. max_mbal is not read again; the number grows by X. */
inline lost() {
    h[id].mbal = h[id].mbal + HOSTS;
    h[id].at = 0; h[id].best = 0; h[id].value = 0;
#ifdef BROKEN_SHARERS_FORGOTTEN
    h[id].sharers = 0;
#endif
    h[id].pc = (h[id].mbal > MBALS -> STUCK : REREAD)
}

inline success() {
    learned();
    h[id].at = 0; h[id].best = 0; h[id].value = 0; h[id].mbal = 0; h[id].marks = 0;
    if
    :: h[id].shared -> h[id].pc = SHARE
    :: !h[id].shared && h[id].sharers != 0 -> h[id].at = 1; h[id].pc = OTHERS
    :: else -> won(1); h[id].pc = HELD
    fi
}

/* `at` on the next sector that is not our own: ours matches itself. */
inline advance() {
    h[id].at++;
    if
    :: h[id].at == id -> h[id].at++
    :: else
    fi
}

proctype host(byte id) {
    int x;  /* 0 between steps */
    do
    /* 12.1: the leader, later the dblocks */
    :: atomic { h[id].pc == IDLE && h[id].tries < ACQUIRES && h[id].pending == 0 ->
        h[id].tries++;
#ifdef SHARED
        if
        :: h[id].shared = 0
        :: h[id].shared = 1
        fi;
#endif
        h[id].pc = READ }

    :: atomic { h[id].pc == READ ->
        h[id].cur = leader;
        h[id].sharers = 0;
        h[id].pc = (NEXT > LVERS -> STUCK : MAXIMUM) }

    :: atomic { h[id].pc == MAXIMUM ->
        i = 1;
        do
        :: i > HOSTS -> break
        :: else -> x = (B_MBAL(block[i]) > x -> B_MBAL(block[i]) : x); i++
        od;
        i = 0;
#ifdef BROKEN_MBAL_NOT_UNIQUE
        h[id].mbal = x / HOSTS * HOSTS + HOSTS;
#else
        h[id].mbal = (x == 0 -> id : x / HOSTS * HOSTS + HOSTS + id);
#endif
        x = 0;
        if
        :: h[id].mbal > MBALS -> h[id].pc = STUCK
        :: else ->
            if
            /* 12.2: free, or ours now or from an earlier life: the record in hand will do */
            :: !L_OWNED(h[id].cur) ||
               (V_HOST(L_VALUE(h[id].cur)) == id && V_GEN(L_VALUE(h[id].cur)) <= h[id].gen) -> h[id].pc = PHASE1
            :: else -> h[id].pc = LIVENESS
            fi
        fi }

    /* 12.2.1, abstract: the owner's delta lease tells whether it is alive in that generation */
    :: atomic { h[id].pc == LIVENESS ->
        if
        :: !SEEN_ALIVE(V_HOST(L_VALUE(h[id].cur)), V_GEN(L_VALUE(h[id].cur))) -> h[id].pc = REREAD
        :: else ->
            if
            :: L_WRITER(h[id].cur) != V_HOST(L_VALUE(h[id].cur)) -> h[id].pc = REL
            :: else -> give_up()
            fi
        fi }

    :: atomic { h[id].pc == REL ->
        if
        :: B_RELEASED(block[V_HOST(L_VALUE(h[id].cur))]) -> h[id].pc = REREAD
        :: else -> give_up()
        fi }

    /* 12.3 steps 1 to 3 */
    :: atomic { h[id].pc == REREAD ->
        if
#ifdef SPARED_REREAD
        :: h[id].pc = PHASE1
#elif defined(BROKEN_NEXT_FROM_REREAD)
        :: h[id].cur = leader; h[id].pc = (NEXT > LVERS -> STUCK : PHASE1)
#else
        :: L_LVER(leader) == NEXT && WON(L_VALUE(leader)) -> success(); h[id].cur = leader
        :: L_LVER(leader) == NEXT && !WON(L_VALUE(leader)) ->
            give_up()
        :: L_LVER(leader) != NEXT && leader != h[id].cur -> h[id].mbal = 0; h[id].pc = READ
        :: leader == h[id].cur -> h[id].pc = PHASE1
#endif
        fi }

    /* 12.4 */
    :: atomic { h[id].pc == PHASE1 ->
        h[id].kept = BLOCK(h[id].mbal, 0, 0, NEXT);
        h[id].value = ME;
        h[id].at = 0;
        advance();
        h[id].marks = 1;
        write_block(h[id].kept, SCAN1) }

    :: atomic { h[id].pc == SCAN1 ->
        x = block[h[id].at];
        if
        :: B_SHARED(x) -> h[id].sharers = h[id].sharers | (1 << h[id].at)
        :: else
        fi;
        if
#ifndef BROKEN_BIGGER_LVER_IGNORED
        :: B_LVER(x) > NEXT -> lost()
#endif
        :: B_LVER(x) == NEXT && B_MBAL(x) > h[id].mbal -> lost()
        :: else ->
            if
#ifndef BROKEN_CANDIDATES_IGNORED
            :: B_LVER(x) == NEXT && B_INP(x) != 0 && B_BAL(x) > h[id].best ->
                h[id].best = B_BAL(x); h[id].value = B_INP(x)
#endif
            :: else
            fi;
            advance();
            if
            :: h[id].at > HOSTS -> h[id].at = 0; h[id].best = 0;
#ifdef BROKEN_NO_PHASE_2
                h[id].kept = BLOCK(h[id].mbal, h[id].mbal, h[id].value, NEXT);
                h[id].pc = COMMIT
#else
                h[id].pc = PHASE2
#endif
            :: else
            fi
        fi;
        x = 0 }

    :: atomic { h[id].pc == PHASE2 ->
        h[id].kept = BLOCK(h[id].mbal, h[id].mbal, h[id].value, NEXT);
        advance();
#ifdef BROKEN_NO_READ_BACK
        h[id].at = 0;
        write_block(h[id].kept, COMMIT)
#else
        write_block(h[id].kept, SCAN2)
#endif
        }

    :: atomic { h[id].pc == SCAN2 ->
        x = block[h[id].at];
        if
#ifndef BROKEN_BIGGER_LVER_IGNORED
        :: B_LVER(x) > NEXT -> lost()
#endif
        :: B_LVER(x) == NEXT && B_MBAL(x) > h[id].mbal -> lost()
        :: else ->
            advance();
            if
            :: h[id].at > HOSTS -> h[id].at = 0; h[id].pc = COMMIT
            :: else
            fi
        fi;
        x = 0 }

    /* 12.3 steps 5 and 6 */
    :: atomic { h[id].pc == COMMIT ->
        x = LEADER(NEXT, h[id].value, id);
        if
        :: landed_leader(x);
            if
            :: WON(h[id].value) -> success(); h[id].cur = x
            :: else -> give_up()
            fi
        :: timeouts > 0 && h[id].pending == 0 ->
            timeouts--; h[id].pending = 2; h[id].late = x; h[id].pc = UNDO
        fi;
        x = 0 }

    /* 14: each sharer found is looked at again. `value` notes that one of them lives. */
    :: atomic { h[id].pc == OTHERS ->
        if
        :: h[id].at > HOSTS ->
            h[id].at = 0; h[id].sharers = 0;
            if
            :: h[id].value -> h[id].value = 0; h[id].pc = HELD
            :: else -> won(1); h[id].pc = HELD
            fi
        :: h[id].at <= HOSTS && (h[id].at == id || !(h[id].sharers & (1 << h[id].at))) -> h[id].at++
        :: h[id].at <= HOSTS && h[id].at != id && (h[id].sharers & (1 << h[id].at)) ->
            x = block[h[id].at];
            if
            :: B_SHARED(x) && ALIVE(h[id].at) && h[h[id].at].gen <= B_MODE_GEN(x) -> h[id].value = 1
            :: else
            fi;
            h[id].at++;
            x = 0
        fi }

    /* 13: use ends first; then RELEASED, then the leader */
    :: atomic { h[id].pc == HELD ->
        use[id] = 0;
        marked(x);
        write_block(x, CHECK);
        x = 0 }

    /* Another's commit, or another's lease by now: nothing to write. Who shares has its mode block. */
    :: atomic { h[id].pc == CHECK ->
        if
#ifdef SPARED_WRITER_CHECK
        :: leader == h[id].cur -> h[id].pc = FREE
        :: leader != h[id].cur ->
#else
        :: L_WRITER(leader) == id && leader == h[id].cur -> h[id].pc = FREE
        :: L_WRITER(leader) != id || leader != h[id].cur ->
#endif
            if
            :: use[id] == 2 -> h[id].cur = 0; h[id].pc = SHARING
            :: else -> done()
            fi
        fi }

    :: atomic { h[id].pc == FREE ->
        x = LEADER(L_LVER(h[id].cur), V_OWNER(ME), id);
        if
        :: landed_leader(x);
            if
            :: use[id] == 2 -> h[id].cur = 0; h[id].pc = SHARING
            :: else -> done()
            fi
        :: timeouts > 0 && h[id].pending == 0 ->
            timeouts--; h[id].pending = 2; h[id].late = x; use[id] = 0; h[id].pc = UNDO
        fi;
        x = 0 }

    /* 15. The host waits for its own late write to end before it touches the lease again. */
#ifdef BROKEN_LATE_WRITE_NOT_AWAITED
    :: atomic { h[id].pc == UNDO ->
#else
    :: atomic { h[id].pc == UNDO && h[id].pending == 0 ->
#endif
        h[id].marks = 0;
        marked(x);
        write_block(x, UNDO_READ);
        x = 0 }

    :: atomic { h[id].pc == UNDO_READ ->
        if
        :: L_OWNED(leader) && L_WRITER(leader) == id && MINE(L_VALUE(leader)) -> h[id].cur = leader; h[id].pc = UNDO_FREE
        :: else -> done()
        fi }

    :: atomic { h[id].pc == UNDO_FREE ->
        x = LEADER(L_LVER(h[id].cur), V_OWNER(ME), id);
        if
        :: landed_leader(x); done()
        :: timeouts > 0 && h[id].pending == 0 ->
            timeouts--; h[id].pending = 2; h[id].late = x; h[id].pc = UNDO
        fi;
        x = 0 }

#ifdef SHARED
    /* 14: the mode block first, then the leader */
    :: atomic { h[id].pc == SHARE ->
        h[id].sharers = 0;
        write_block(h[id].kept | RELEASED | MODE(h[id].gen), CHECK);
        if
        :: h[id].pc == CHECK -> won(2)
        :: else
        fi }

    :: atomic { h[id].pc == SHARING ->
        use[id] = 0;
        write_block(h[id].kept | RELEASED, IDLE);
        if
        :: h[id].pc == IDLE -> done()
        :: else
        fi }
#endif
    od
}

/*
 * When no host is at work and no write is on its way, a live host that tries alone gets the lease: the leader says free,
 * or the rules make it so, and no sector is in a later version than the one that its ballot will decide.
 */
inline quiet() {
    v = L_VALUE(leader);
    assert(!L_OWNED(leader) || !SEEN_ALIVE(V_HOST(v), V_GEN(v)) ||
           (L_WRITER(leader) != V_HOST(v) && B_RELEASED(block[V_HOST(v)])));
    v = 0;
    i = 1;
    do
    :: i > HOSTS -> break
    :: else -> assert(B_LVER(block[i]) <= L_LVER(leader) + 1); i++
    od;
    i = 0
}

#define AT_REST(q) ((h[q].pc == IDLE || h[q].pc == DEAD) && h[q].pending == 0)
#if HOSTS > 2
#define ALL_AT_REST (AT_REST(1) && AT_REST(2) && AT_REST(3))
#else
#define ALL_AT_REST (AT_REST(1) && AT_REST(2))
#endif

#ifdef BROKEN_GENERATION_KEPT
#define COMES_BACK(q) h[q].pc = IDLE
#else
#define COMES_BACK(q) h[q].gen++; h[q].pc = IDLE
#endif
#ifdef BROKEN_BACK_AT_ONCE
#define RETURNS(q) (h[q].pc == CRASHED || h[q].pc == DEAD)
#else
#define RETURNS(q) (h[q].pc == DEAD)
#endif

#define WORLD(q) \
    :: atomic { crashes > 0 && h[q].pc < STUCK -> crashes--; forget(q); h[q].kept = 0; h[q].pc = CRASHED } \
    :: atomic { h[q].pc == CRASHED && h[q].pending == 0 -> use[q] = 0; h[q].pc = DEAD } \
    :: atomic { RETURNS(q) -> use[q] = 0; COMES_BACK(q) } \
    :: atomic { h[q].pending == 1 -> block[q] = h[q].late; h[q].late = 0; h[q].pending = 0 } \
    :: atomic { h[q].pending == 2 -> landed_leader(h[q].late); h[q].late = 0; h[q].pending = 0 } \
    :: atomic { h[q].pending != 0 -> h[q].late = 0; h[q].pending = 0 }

/* Crashes, deaths, returns, and the moments at which late writes end. */
proctype world() {
    byte v;
    do
#ifdef QUIET
    :: atomic { ALL_AT_REST -> quiet() }
#endif
    WORLD(1)
    WORLD(2)
#if HOSTS > 2
    WORLD(3)
#endif
    od
}

init {
    atomic {
        leader = LEADER(0, 0, 0);
        i = 1;
        do
        :: i > HOSTS -> break
        :: else -> h[i].gen = 1; run host(i); i++
        od;
        i = 0;
        run world()
    }
}
