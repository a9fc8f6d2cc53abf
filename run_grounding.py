from functools import partial

from hivilt.training.command import run_command, run_task

main = partial(run_task, "hivilt.tasks.arguments:GroundingArguments")

if __name__ == "__main__":
    run_command(main)
