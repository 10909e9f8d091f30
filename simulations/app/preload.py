"""What a worker process imports while it waits for its first message: all that it will need.

Ray imports this module when it starts a worker (``RAY_preload_python_modules``), at the same time
as the server reads its data, so that the first message finds a worker that is ready.
"""

from simulations.app.imports import without_collection

with without_collection():
    import simulations.app.client_app  # noqa: F401
    from fedlora.models.loading import import_transformers

    import_transformers()
