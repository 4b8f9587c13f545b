"""Shapes and windows that attention's forward and backward are both tested on."""

# name: (B, Sq, Sk, Hq, Hkv, D, Dv), settings
PLAIN_CASES = {
    "one tile": ((1, 64, 64, 1, 1, 64, 64), {}),
    "one key": ((2, 3, 1, 1, 1, 1, 1), {}),
    "one query": ((2, 1, 300, 4, 2, 64, 64), {"causal": True}),
    "grouped": ((2, 140, 140, 6, 2, 64, 64), {"causal": True}),
    "multi-query": ((1, 70, 131, 3, 1, 59, 59), {"causal": True}),
    "more queries than keys": ((1, 200, 77, 2, 2, 13, 13), {"causal": True}),
    "left window": ((1, 150, 290, 1, 1, 33, 33), {"causal": True, "window": (64, -1)}),
    "right window": ((1, 290, 150, 1, 1, 80, 80), {"window": (-1, 3)}),
    "window of one": ((1, 129, 129, 1, 1, 128, 128), {"window": (0, 0)}),
    "wide values": ((1, 65, 66, 2, 1, 32, 160), {"causal": True}),
    "widest": ((1, 97, 64, 2, 2, 256, 256), {}),
    "zero scale": ((1, 100, 100, 1, 1, 16, 16), {"softmax_scale": 0.0}),
}
