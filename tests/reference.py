"""
HiViLT's fusion once more, in plain loops over float64 numbers, written from the equations alone: one image, one text,
one token, one head at a time. It shares no code with the model; it is what the model is measured against.
"""

import math

import numpy as np


def linear(weights: dict, name: str, x: np.ndarray) -> np.ndarray:
    y = np.zeros(weights[f"{name}.weight"].shape[0])
    for i, row in enumerate(weights[f"{name}.weight"]):
        y[i] = sum(a * b for a, b in zip(row, x, strict=True))
        if f"{name}.bias" in weights:
            y[i] += weights[f"{name}.bias"][i]
    return y


def layer_norm(weights: dict, name: str, x: np.ndarray, eps: float) -> np.ndarray:
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    return np.array(
        [
            (v - mean) / math.sqrt(variance + eps) * weights[f"{name}.weight"][i] + weights[f"{name}.bias"][i]
            for i, v in enumerate(x)
        ]
    )


def gelu(x: np.ndarray) -> np.ndarray:
    return np.array([v * 0.5 * (1.0 + math.erf(v / math.sqrt(2.0))) for v in x])


def mlp(weights: dict, name: str, x: np.ndarray) -> np.ndarray:
    return linear(weights, f"{name}.fc2", gelu(linear(weights, f"{name}.fc1", x)))


def attend(query: np.ndarray, keys: list, values: list, num_heads: int) -> np.ndarray:
    """softmax(q K^T / sqrt(d_k)) V of one query, head by head; zeros where there is nothing to look at."""
    width = len(query) // num_heads
    result = np.zeros(len(query))
    if not keys:
        return result
    for head in range(num_heads):
        part = slice(head * width, (head + 1) * width)
        scores = [sum(query[part] * key[part]) / math.sqrt(width) for key in keys]
        highest = max(scores)
        exponentials = [math.exp(score - highest) for score in scores]
        for exponential, value in zip(exponentials, values, strict=True):
            result[part] += exponential / sum(exponentials) * value[part]
    return result


def mean(rows: list) -> np.ndarray:
    return sum(rows) / len(rows)


def pool_grid(grid: list[list], stride: int) -> list[list]:
    """Averages squares of `stride` cells a side; those at the border hold what is left."""
    height, width = len(grid), len(grid[0])
    return [
        [
            mean(
                [
                    grid[y][x]
                    for y in range(top, min(top + stride, height))
                    for x in range(left, min(left + stride, width))
                ]
            )
            for left in range(0, width, stride)
        ]
        for top in range(0, height, stride)
    ]


def resample(grid: list[list], height: int, width: int) -> list[list]:
    """Each new cell is the mean of the old cells that it covers, even in part."""
    old_height, old_width = len(grid), len(grid[0])
    rows = []
    for y in range(height):
        ys = range(y * old_height // height, -(-(y + 1) * old_height // height))
        row = []
        for x in range(width):
            xs = range(x * old_width // width, -(-(x + 1) * old_width // width))
            row.append(mean([grid[j][i] for j in ys for i in xs]))
        rows.append(row)
    return rows


def smooth(tokens: list, window: int) -> list:
    half = window // 2
    return [mean(tokens[max(0, i - half) : i + half + 1]) for i in range(len(tokens))]


def fuse_local(weights, stage, vision, text, num_heads, top_k):
    """Equation L over lists of vision and of text rows, padding already gone."""
    prefix = f"fusion.vision_projections.{stage}"
    q_v, k_v, v_v = ([linear(weights, f"{prefix}.{p}_proj", row) for row in vision] for p in "qkv")
    prefix = f"fusion.text_projections.{stage}"
    q_t, k_t, v_t = ([linear(weights, f"{prefix}.{p}_proj", row) for row in text] for p in "qkv")

    # which vision tokens take part for each text token: the most similar ones, or all
    takes_part = []
    for query in q_t:
        similarity = [sum(query * key) for key in k_v]
        ranked = sorted(range(len(vision)), key=lambda i: -similarity[i])
        takes_part.append(set(ranked if top_k is None else ranked[:top_k]))

    new_vision = []
    for i, own in enumerate(vision):
        texts = [t for t in range(len(text)) if i in takes_part[t]]
        if not texts:
            new_vision.append(own)
            continue
        seen = attend(q_v[i], [k_t[t] for t in texts], [v_t[t] for t in texts], num_heads)
        new_vision.append(
            own + mlp(weights, f"fusion.stages.{stage}.vision_mlp", np.concatenate([own, seen, own * seen]))
        )
    new_text = []
    for t, own in enumerate(text):
        images = sorted(takes_part[t])
        seen = attend(q_t[t], [k_v[i] for i in images], [v_v[i] for i in images], num_heads)
        new_text.append(own + mlp(weights, f"fusion.stages.{stage}.text_mlp", np.concatenate([own, seen, own * seen])))
    return new_vision, new_text


def cross_attention(weights, name, query, context, num_heads):
    keys = [linear(weights, f"{name}.k_proj", row) for row in context]
    values = [linear(weights, f"{name}.v_proj", row) for row in context]
    return linear(weights, f"{name}.o_proj", attend(linear(weights, f"{name}.q_proj", query), keys, values, num_heads))


def fuse(weights: dict, config, maps: list[np.ndarray], tokens: np.ndarray) -> dict[str, np.ndarray]:
    """
    Equations L, P and G for one image and one text.

    Args:
        weights (`dict[str, np.ndarray]`): the model's parameters by name, float64.
        config ([`HiViLTConfig`]): sizes and flags.
        maps (`list` of arrays `(height, width, channels)`): the chosen vision hidden states, one for each stage.
        tokens (array `(tokens, width)`): the text encoder's states without padding.
    """
    num_stages, num_heads = config.num_fusion_stages, config.num_attention_heads
    strides = [stride for _, stride, _ in config.vision_level_layout]
    vision_levels, text_levels = [], []
    for stage in range(num_stages) if config.use_local_fusion else [num_stages - 1]:
        level = len(vision_levels)
        grid = pool_grid([list(row) for row in maps[stage]], strides[stage])
        name = f"fusion.vision_levels.{level}"
        vision_levels.append([])
        for y, row in enumerate(grid):
            vision_levels[-1].append([])
            for x, cell in enumerate(row):
                projected = linear(weights, f"{name}.projection", cell)
                if config.use_position_embeddings:
                    # From -sqrt(3) at the first border to sqrt(3) at the last.
                    place = [((y + 0.5) / len(grid) * 2 - 1) * 3**0.5, ((x + 0.5) / len(row) * 2 - 1) * 3**0.5]
                    projected = projected + weights[f"{name}.position_projection.weight"] @ np.array(place)
                vision_levels[-1][-1].append(layer_norm(weights, f"{name}.norm", projected, config.layer_norm_eps))
        text_levels.append(
            [
                layer_norm(
                    weights,
                    f"fusion.text_levels.{level}.norm",
                    linear(weights, f"fusion.text_levels.{level}.projection", token),
                    config.layer_norm_eps,
                )
                for token in smooth(list(tokens), 3**stage)
            ]
        )

    flat = lambda grid: [cell for row in grid for cell in row]
    vision_global, text_global = mean(flat(vision_levels[-1])), mean(text_levels[-1])
    vision, text = flat(vision_levels[-1]), text_levels[-1]
    if config.use_local_fusion:
        found = None
        for stage in range(num_stages):
            grid, text = vision_levels[stage], text_levels[stage]
            height, width = len(grid), len(grid[0])
            vision = flat(grid)
            if found is not None:
                old_grid, old_text = found
                vision = [a + b for a, b in zip(vision, flat(resample(old_grid, height, width)), strict=True)]
                text = [a + b for a, b in zip(text, old_text, strict=True)]
            vision, text = fuse_local(weights, stage, vision, text, num_heads, config.fusion_top_k)
            found = [vision[y * width : (y + 1) * width] for y in range(height)], text

    if config.use_global_fusion:
        pooled = mean(vision + text)
        name = "fusion.global_fusion"
        vision_state = vision_global + cross_attention(
            weights, f"{name}.vision_attention", vision_global, [text_global, pooled], num_heads
        )
        text_state = text_global + cross_attention(
            weights, f"{name}.text_attention", text_global, [vision_global, pooled], num_heads
        )
    else:
        vision_state, text_state = mean(vision), mean(text)
    return {
        "local_fusion_state": np.array(vision + text),
        "vision_global_state": vision_state,
        "text_global_state": text_state,
        "global_fusion_state": mlp(weights, "fusion.global_fusion.mlp", np.concatenate([vision_state, text_state])),
    }
