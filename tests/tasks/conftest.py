from trainers import captioned, dataset, grounded, opened, stated  # noqa: F401
