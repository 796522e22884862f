"""`python -m jaxtml`: the command line. See `jaxtml.commands.main`."""

import sys

if __name__ == "__main__":
    try:
        from jaxtml.commands.main import run
    except ModuleNotFoundError as error:  # this Python is not the one into which jaxtml was installed
        package = (error.name or "").split(".")[0]
        if package in ("", "jaxtml"):
            raise
        print(
            f"jaxtml: the Python package {package} is missing from {sys.executable}: activate the environment into "
            "which you installed jaxtml, or run `pip install .` in its folder",
            file=sys.stderr,
        )
        sys.exit(2)
    run()
