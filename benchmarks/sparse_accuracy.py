"""What sparse fusion costs in accuracy, on the training questions of easy-VQA that are held out to choose by.

    python benchmarks/sparse_accuracy.py                           trains once with fusion_top_k=4, about 15 minutes
    python benchmarks/sparse_accuracy.py --top_k 2

The model of this repository was trained dense, on 64, 16 and 4 vision tokens. Its accuracy is measured as it is, with
fewer and fewer of them for each text token, and that of the same recipe trained with `--top_k`; a sixteenth of the finest
level is as much as 32 tokens of a picture with 576. Flags that are not its own go to run_vqa.py. The test split is not
read. It leaves a JSON file, with the processor in its name, in benchmarks/results.
"""

import argparse
import io
import json
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

from hivilt import HiViLTForQuestionAnswering, HiViLTProcessor, run_vqa
from hivilt.training import environment, write_result_file

ROOT = Path(__file__).parents[1]


def validate(flags: list[str]) -> dict:
    """Accuracy of a run of run_vqa.py on its validation questions, in [0, 1], and how many there are."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        found = run_vqa.main(["--do_eval", "--output_dir", folder, "--disable_tqdm", "true", *flags])
    return {name: found["validation"][name] for name in ("accuracy", "num_questions")}


def fused_rows(model: HiViLTForQuestionAnswering, processor: HiViLTProcessor) -> list[int]:
    """How many vision tokens each stage fuses for a question about the picture of README."""
    rows = []
    for stage in model.model.fusion.stages:
        stage.vision_mlp.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    model(**processor(images=ROOT / "docs/picture.png", text="what color is the triangle?", return_tensors="pt"))
    return rows


def main(argv: list[str] | None = None) -> dict:
    """Measures, prints and writes; returns what the JSON file holds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--top_k", type=int, default=4, help="vision tokens a text token, of the run that trains")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "results")
    args, flags = parser.parse_known_args(argv)

    results = {"environment": environment(), "trained_dense": {}}
    processor = HiViLTProcessor.from_pretrained(ROOT)
    for top_k in (None, 16, 8, 4, 2, 1):
        model = HiViLTForQuestionAnswering.from_pretrained(ROOT, fusion_top_k=top_k)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            found = validate(["--model_name_or_path", folder, *flags])
        found["fused_rows"] = fused_rows(model, processor)
        results["trained_dense"][str(top_k)] = found
        print(f"trained dense, fusion_top_k={top_k}: {found}", flush=True)
    fusion = json.dumps({"fusion_top_k": args.top_k})
    found = validate(["--do_train", "--fusion", fusion, *flags])
    results["trained_sparse"] = {"fusion_top_k": args.top_k, **found}
    print(f"trained with fusion_top_k={args.top_k}: {found}")
    write_result_file(args.output_dir, "sparse_accuracy", results)
    return results


if __name__ == "__main__":
    main()
