"""`normalize`: scores less the mean of their group, over its standard deviation, beside the scores.

recipe.py      what a group is, and which scores
groups.py      scores by group → mean and standard deviation of each, exact, in bounded memory
columns.py     a part's scores and its rows' groups; its rows with the normalised columns
normalize.py   both passes over all parts, and the output
result.py, verify.py   what was done, as a value; and a second look at it
"""
