"""`python -m jaxtml` is `jaxtml`."""

from jaxtml.cli import run

run()
