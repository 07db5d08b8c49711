"""A scored output as one HTML page that people look at.

    values.py    a committed shard → the few arrays that the page needs; read in a process apart
    sums.py      histograms, means and spreads that add up
    tally.py     the arrays of all shards → counts and sums, exact; and small samples
    figures.py   the tally → figures: values, a drawing of them, and a table of the same values
    svg.py       a drawing → SVG text
    nights.py    the records of nightly runs → figures
    page.py      a scored output, or a nightly root → its page
    comparison.py, compare.py     the same for two outputs of the same rows
    write.py     a page → a file, or an object beside `_SUCCESS`

What is drawn is pure functions of what was read: `sums`, `tally`, `figures` and `svg` open nothing.
"""
