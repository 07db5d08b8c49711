"""A scored output as one HTML page that people look at.

    values.py    a committed shard → the few arrays that the page needs; read in a process apart
    tally.py     those of all shards → counts, histograms and sums, exact; and small samples
    figures.py   the tally → figures: values, a drawing of them, and a table of the same values
    svg.py       a drawing → SVG text
    page.py      a scored output → its page
    comparison.py, compare.py     the same for two outputs of the same rows
    write.py     a page → the file

What is drawn is pure functions of what was read: `tally`, `figures` and `svg` open nothing.
"""
