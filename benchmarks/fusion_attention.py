"""Where the words of a relational question look, stage by stage: an image of `runs/sort_of_clevr.sh`'s checkpoint.

    python -m hivilt.data.sort_of_clevr sort_of_clevr && runs/sort_of_clevr.sh --data_dir sort_of_clevr
    python benchmarks/fusion_attention.py --data_dir sort_of_clevr

It takes the first test question of `--question`'s words (unset: what shape is nearest) and writes a PNG file.
"""

import argparse
from pathlib import Path

import torch

from hivilt import HiViLTForQuestionAnswering, HiViLTProcessor
from hivilt.data.tables import open_image
from hivilt.data.vqa import VQAExample
from hivilt.data.vqa_benchmarks import VQA_BENCHMARKS
from plots import plot_attention


@torch.no_grad()
def draw(checkpoint: Path, example: VQAExample, path: Path) -> None:
    """Answers one question and draws where it looked."""
    # Eager attention alone shows its weights.
    model = HiViLTForQuestionAnswering.from_pretrained(checkpoint, attn_implementation="eager").eval()
    processor = HiViLTProcessor.from_pretrained(checkpoint)
    image = open_image(example.image)
    inputs = processor(images=image, text=example.question, return_tensors="pt")
    images = model.encode_images(inputs.pop("pixel_values"))
    outputs = model(**inputs, image_states=images, output_attentions=True)
    stages = []
    for number, (level, attention) in enumerate(zip(images.level_states, outputs.cross_attentions, strict=True)):
        grid = level.shape[1:3]
        # (1, heads, N_t, N_v) -> (N_t, rows, columns)
        maps = attention[0].mean(dim=0).unflatten(1, grid).numpy()
        stages.append((f"stage {number + 1}\n{grid[0]} x {grid[1]}", maps))
    looks = {}
    sides = [("image", "question"), ("question", "image")]
    for (own, other), attention in zip(sides, outputs.global_cross_attentions, strict=True):
        shares = attention[0].mean(dim=(0, 1)).tolist()
        looks[own] = dict(zip((other, "local fusion"), shares, strict=True))
    (answers,) = processor.post_process_question_answering(outputs.logits, top_k=1, config=model.config)
    title = f"{example.question}  {answers[0]['answer']} ({answers[0]['score']:.0%}; right: {example.answers[0]})"
    words = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    plot_attention(image, words, stages, looks, title, path)


def main(argv: list[str] | None = None) -> None:
    """Draws; says where to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("outputs/sort_of_clevr"))
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--question", default="what shape is the object nearest to", help="how it begins")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "fusion_attention.png")
    args = parser.parse_args(argv)
    benchmark = VQA_BENCHMARKS["sort-of-clevr"]
    examples = benchmark.read(benchmark.splits["test"], args.data_dir)
    found = next((example for example in examples if example.question.startswith(args.question)), None)
    if found is None:
        parser.error(f"question: no test question begins with {args.question!r}")
    draw(args.checkpoint, found, args.output)
    print(args.output)


if __name__ == "__main__":
    main()
