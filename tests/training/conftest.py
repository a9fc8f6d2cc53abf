from trainers import captioned, dataset, opened  # noqa: F401
