"""Source of the python-backend models; the repository holds copies as `<model>/1/model.py`."""
