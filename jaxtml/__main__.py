"""`python -m jaxtml` is `jaxtml`."""

from jaxtml.commands.main import run

run()
