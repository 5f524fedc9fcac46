"""What must outlive a worker that is killed: state in shared memory, whole at any moment.

Descriptors need no journal, for guardian and workers share their table; what they stand for does. The memory
is a memfd of the guardian's, mapped by every process of the family. One process writes at a time: the worker.
"""
