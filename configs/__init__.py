"""The named configs. `jaxtml.config.load(NAME)` reads these files by their path; nothing imports this folder."""
