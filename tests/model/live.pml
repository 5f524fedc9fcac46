/*
 * One host id in time: join, renewal, expiry, leaving, death, and the taking over of its lease.
 *
 * Section numbers are those of docs/paxos-format.md. docs/model.md says what is left out and why.
 *
 * Hosts      1 and 2, with different names, both want the same id (its delta sector). The host with the id takes the
 *            lease. A third, which has another id and never fails, watches the sector and takes the lease when the
 *            rules let it.
 * Time       Whole ticks of one clock without drift, T = 1 tick. Hosts may be slow or stand still for any time, and so
 *            notice late what time has done; one that stands still for ever has crashed. Events of one tick come in
 *            any order, so a wait is strictly longer than its ticks, and an I/O in time takes at most its ticks.
 * Writes     land at once, later or never. A host is reset by its watchdog, and its writes end with it, at 8T+W after
 *            the clock before its last good renewal, or before the write with which it wanted to join. It starts
 *            nothing new before its writes have ended.
 * Lease      One word that names the generation of the owner; the ballot is one step here (ballot.pml).
 * Bounds     W ticks of watchdog, JOINS attempts to join per host, generations up to GENS.
 *
 * Properties: one live owner of the id (where a host becomes JOINED); nobody takes the lease while another's I/O under
 * it can reach the storage (`take`, and where a host takes it).
 *
 * BROKEN_... selects a variant that lacks one step; each must be caught.
 */

#ifndef W
#define W 2
#endif
#ifndef JOINS
#define JOINS 1
#endif
#ifndef GENS
#define GENS 3
#endif

#define T       1
#define EXPIRY  (8 * T)
#define FENCED  (8 * T + W)
#define DEATH   (8 * T + W)
#define SHORT   (2 * T)
#ifdef BROKEN_NO_DEAD_DELAY
#undef DEATH
#define DEATH   EXPIRY
#endif
#define FAR     (8 * T + W + 1)

/* the delta sector: who wrote it last (0: nobody), its generation, and whether it is free (timestamp 0) */
byte name;
byte gen;
bit  owned;

#define OUT      0
#define READ     1  /* 10.1 step 2 done, `t` ticks ago */
#define LONG     2  /* 10.1 step 5 */
#define JOINING  3  /* 10.1 step 6: the write is on its way */
#define WAITING  4  /* 10.1 step 7 */
#define JOINED   5
#define ENDING   6  /* given up, left or expired; its writes may still land */

typedef Host {
    byte pc;
    byte joins;
    byte gen;
    byte t;        /* of a wait */
    byte age;      /* since last_ts, the clock before the last good renewal */
    byte write;    /* 0 none, 1 renewal or join, 2 the free record: on its way */
    bit  asked;    /* a renewal was issued whose end it has not seen */
    byte since;    /* since the clock before that write */
    bit  changed;  /* the sector is not what it saw or wrote last */
    bit  use;      /* its I/O under the lease can reach the storage */
};
Host h[3];

byte lease;      /* generation of the owner; 0 free; OTHER: the third host's */
#define OTHER 15

/* the third host's watch entry */
byte watched = FAR + 1;  /* ticks since the last change it saw; FAR + 1: never looked */
bit  moved = 1;          /* changed since */

#define OF(q) (3 - (q))

inline write_lands(q) {
    name = q; gen = h[q].gen;
    owned = (h[q].write == 1);
    h[q].write = 0;
    h[q].changed = 0; h[OF(q)].changed = 1; moved = 1
}

inline stop(q) { h[q].t = 0; h[q].asked = 0; h[q].changed = 0; h[q].since = 0 }

inline out(q) { stop(q); h[q].age = 0; h[q].pc = OUT }

/* Leases are over, I/O under them may still be on its way. */
inline ending(q) { stop(q); h[q].pc = ENDING }

proctype host(byte id) {
    do
    /* 10.1 */
    :: atomic { h[id].pc == OUT && h[id].write == 0 && h[id].joins < JOINS && gen < GENS ->
        h[id].joins++;
        h[id].t = 0;
        h[id].changed = 0;
        h[id].gen = gen + 1;
        if
        :: !owned -> h[id].pc = READ
#ifdef BROKEN_NAME_REUSED
        :: owned -> h[id].pc = READ
#else
        :: owned -> h[id].pc = LONG
#endif
        fi }
    :: atomic { h[id].pc == LONG && h[id].t > DEATH ->
        h[id].t = 0;
        if
#ifdef BROKEN_NO_REREAD_AFTER_LONG_DELAY
        :: h[id].pc = READ
#else
        :: !h[id].changed -> h[id].pc = READ
        :: h[id].changed && !owned -> h[id].changed = 0; h[id].gen = gen + 1; h[id].pc = READ
        :: h[id].changed && owned -> out(id)
#endif
        fi }
    :: atomic { h[id].pc == READ ->
        if
        :: h[id].t <= T -> h[id].write = 1; h[id].age = 0; h[id].t = 0; h[id].pc = JOINING
        :: h[id].t > T -> out(id)
        fi }
    :: atomic { h[id].pc == JOINING && (h[id].write == 0 || h[id].t > T) ->
        if
        :: h[id].write == 0 && h[id].t <= T -> h[id].t = 0; h[id].pc = WAITING
        :: h[id].t > T -> ending(id)
        fi }
#ifdef BROKEN_NO_SHORT_DELAY
    :: atomic { h[id].pc == WAITING ->
#else
    :: atomic { h[id].pc == WAITING && h[id].t > SHORT ->
#endif
        h[id].t = 0;
        if
#ifndef BROKEN_NO_REREAD_AFTER_JOIN
        :: h[id].changed || h[id].age >= EXPIRY -> out(id)
        :: !h[id].changed && h[id].age < EXPIRY ->
#else
        :: h[id].age >= EXPIRY -> out(id)
        :: h[id].age < EXPIRY ->
#endif
            /* The id has one live owner. */
            assert(h[OF(id)].pc != JOINED);
            h[id].pc = JOINED
        fi }

    /* 10.2: reads, checks that the record is its own, writes */
    :: atomic { h[id].pc == JOINED && !h[id].asked && h[id].age >= SHORT ->
        if
        :: name == id && gen == h[id].gen -> h[id].write = 1; h[id].asked = 1; h[id].since = 0
        :: !(name == id && gen == h[id].gen) -> ending(id)
        fi }
#ifdef BROKEN_NOT_GIVEN_UP
    :: atomic { h[id].pc == JOINED && h[id].asked && h[id].write == 0 ->
#else
    :: atomic { h[id].pc == JOINED && h[id].asked && h[id].write == 0 && h[id].age < EXPIRY ->
#endif
#ifdef BROKEN_TIMESTAMP_AFTER_WRITE
        h[id].age = 0;
#else
        h[id].age = h[id].since;
#endif
        h[id].asked = 0; h[id].since = 0 }
#ifndef BROKEN_NOT_GIVEN_UP
    :: atomic { h[id].pc == JOINED && h[id].age >= EXPIRY -> ending(id) }
#endif

    /* 10.3 */
#ifdef BROKEN_LEFT_IN_USE
    :: atomic { h[id].pc == JOINED && !h[id].asked -> h[id].write = 2; ending(id) }
#else
    :: atomic { h[id].pc == JOINED && !h[id].asked && !h[id].use -> h[id].write = 2; ending(id) }
#endif

    /* 12: the lease is free, or is recorded for an earlier life of this id */
    :: atomic { h[id].pc == JOINED && h[id].age < EXPIRY && !h[id].use && lease < h[id].gen ->
        assert(!h[OF(id)].use);
        lease = h[id].gen;
        h[id].use = 1 }
    :: atomic { h[id].pc == JOINED && h[id].age < EXPIRY && h[id].use && lease == h[id].gen ->
        h[id].use = 0; lease = 0 }

    /* all it had on its way has ended */
    :: atomic { h[id].pc == ENDING && h[id].write == 0 -> h[id].use = 0; out(id) }
    od
}

/* under the watchdog: from before the write that joins, until all writes have ended */
#define AGES(q) (h[q].pc >= JOINING)
#ifdef BROKEN_JOINER_UNWATCHED
#define WATCHED(q) (h[q].pc >= JOINED)
#else
#define WATCHED(q) AGES(q)
#endif

/* The watchdog has bitten: whatever was on its way has ended, one way or the other. */
inline bite(q) {
    if
#ifdef BROKEN_NOT_GIVEN_UP
    :: h[q].pc == ENDING && h[q].age >= FENCED ->
#else
    :: WATCHED(q) && h[q].age >= FENCED ->
#endif
        h[q].use = 0;
#ifdef BROKEN_WRITES_OUTLIVE_HOST
        skip;
#else
        if
        :: h[q].write != 0 -> write_lands(q)
        :: h[q].write = 0
        fi;
#endif
        out(q)
    :: else
    fi
}

#define TICK(c) c = (c < FAR -> c + 1 : c)

inline tick(q) {
    if
    :: h[q].pc == READ || h[q].pc == LONG || h[q].pc == JOINING || h[q].pc == WAITING -> TICK(h[q].t)
    :: else
    fi;
    if
    :: AGES(q) -> TICK(h[q].age)
    :: else
    fi;
    if
    :: h[q].asked -> TICK(h[q].since)
    :: else
    fi
}

/* Time, and the landing of writes. */
proctype world() {
    do
    :: atomic { true ->
        bite(1); bite(2);
        tick(1); tick(2);
        watched = (watched < FAR -> watched + 1 : watched) }
    :: atomic { h[1].write != 0 -> write_lands(1) }
    :: atomic { h[2].write != 0 -> write_lands(2) }
    :: atomic { h[1].write != 0 && (h[1].pc == ENDING || h[1].pc == OUT) -> h[1].write = 0 }
    :: atomic { h[2].write != 0 && (h[2].pc == ENDING || h[2].pc == OUT) -> h[2].write = 0 }
    od
}

#ifdef BROKEN_NOW_BEFORE_READ
#define SEEN T  /* the clock as it was before a read that took T */
#else
#define SEEN 0
#endif

inline take() {
    /* Nobody's I/O under the lease can reach the storage any more. */
    assert(!h[1].use && !h[2].use);
    lease = OTHER;
    watched = FAR + 1
}

#define RECORDED (lease != OTHER && lease != 0)

proctype other() {
    do
    /* 12.2.1 */
    :: atomic { RECORDED && (!owned || gen > lease) -> take() }
    :: atomic { RECORDED && owned && gen <= lease && (moved || watched > FAR) -> moved = 0; watched = SEEN }
    :: atomic { RECORDED && owned && gen <= lease && !moved && watched > DEATH && watched <= FAR -> take() }
    :: atomic { lease == OTHER -> lease = 0 }
    od
}

init {
    atomic { run host(1); run host(2); run other(); run world() }
}
