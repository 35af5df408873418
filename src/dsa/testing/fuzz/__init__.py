"""A fuzzer of the operations: random calls, each judged by a brute-force computation in fp64.

`python -m dsa.testing.fuzz --minutes 10` draws one case after another: shapes, strides, storage offsets, dtypes, NaN
and infinities, subnormal numbers, logits and sinks at the edges of fp32, ranges, paged keys, threads, instruction sets.
A case follows from its number alone, and one that fails prints the command that repeats it.

The oracles are NumPy in fp64, one query at a time, and share no code with any implementation. They say how large each
result may err: a bound from the sizes of what was added up, so nothing has to be tuned and nothing fails by bad luck.
"""
