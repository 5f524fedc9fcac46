"""The backend for storage without locks: Disk Paxos leases in sanlock's format, taken by lockfs itself."""
