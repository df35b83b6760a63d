"""The error of a metric that cannot be computed on this machine."""


class MetricUnavailable(RuntimeError):
    """A metric needs something that is not here (a program, a file, weights).

    The message says what is needed and how to get it, so that a results table can show it in place of the value.
    """
