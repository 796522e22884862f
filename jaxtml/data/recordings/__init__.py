"""Recordings of people that training may use, read where they are installed. None is committed."""
