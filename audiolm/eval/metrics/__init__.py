"""Pure metrics: functions of arrays and tensors, each tested on a known value.

A metric knows no run, store or step.  A suite (eval/suites) calls it, sets a ceiling and a floor beside it and returns
eval.results.Result rows with intervals from `stats`.  eval/README.md lists what a new one has to provide.
"""
