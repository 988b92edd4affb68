"""hypothesis for the kernels' tests, which also run where it is not installed: there its tests are skipped."""

import pytest

try:
    from hypothesis import assume, given, settings
    from hypothesis import strategies as st
except ImportError:

    class _Anything:
        """Stands for strategies that nobody draws from."""

        def __getattr__(self, name):
            return self

        def __call__(self, *args, **kwargs):
            return self

    st = _Anything()

    def assume(condition):
        return condition

    def settings(**options):
        return lambda test: test

    def given(*strategies, **named):
        def skip(test):
            # Without the test's own arguments, which pytest would take for fixtures.
            def skipped(*args):
                raise AssertionError("skipped before it is called")

            skipped.__name__ = test.__name__
            return pytest.mark.skip(reason="needs hypothesis")(skipped)

        return skip


__all__ = ["assume", "given", "settings", "st"]
