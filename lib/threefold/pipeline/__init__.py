"""Notebooks through papermill: what is stale, what runs beside what, and what an executed notebook may hold."""
