"""The tests; `tests.tasks` holds the tasks and `tests.twins` the slow computations that they compare with."""
