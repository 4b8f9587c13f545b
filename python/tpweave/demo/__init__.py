"""The demo, started by `tpweave demo`: two ranks on this machine, a real encoder, a real decoder, a small table.

`rank.py` is what each rank runs; `encoder.py`, `decoder.py` and `comparison.py` are its three parts; `report.py` is
what they print and the checks they record; `chart.py` draws the result.
"""
