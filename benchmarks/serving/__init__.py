"""Real servers side by side: what pruning gains and what the plugin costs.

- `python -m benchmarks.serving.paired`: several servers up at once, blocks of requests in shuffled
  order, paired differences with intervals, and a control that can void them.
- `python -m benchmarks.serving.check`: one server, every method once, answers of the right length.
- `python -m benchmarks.serving` (`sweep`): one server after the other over many budgets; fast to
  run, but two servers seen at different times are only roughly comparable.
"""
