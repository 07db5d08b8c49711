"""What people and machines see of a run. Every report is one frozen value, and has two views.

    results.py     the values, computed by pure functions; `to_json` is the view for machines
    views.py       value → lines and tables, for people; formats figures, computes none
    blocks.py      what lines and tables are
    console.py     lines and tables → a terminal; the one place that knows markup
    progress.py    a run while it goes

Other values stand where their data is: `runs.status`, `nightly.status`, `nightly.record`,
`nightly.foresee`, `evaluation.result`.
"""
