from trainers import captioned, dataset, grounded, opened  # noqa: F401
