"""Tools that a model calls in a rollout: functions and environments, calls, results, and the processes that run them."""
