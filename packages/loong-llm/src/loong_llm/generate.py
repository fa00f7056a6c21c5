"""Continues a prompt with plain transformers, from an exported folder: what comes out proves what was exported.

Only local safetensors are read, no code of the folder is run. `loong generate` does it in a process of its own, so
that the command line itself imports no tensor library.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from loong_core.errors import CheckpointError, LoongError

EXPORT = "hf"


def model_folder(path: Path) -> Path:
    """The folder to open: `path` itself, or the export of a run folder.

    Raises `CheckpointError` where there is no config.json, no safetensors file, or no tokenizer.
    """
    folder = path if (path / "config.json").is_file() and not (path / "state.json").is_file() else path / EXPORT
    if not (folder / "config.json").is_file():
        what = "does not exist" if not path.exists() else f"has neither a config.json nor a folder {EXPORT}/"
        raise CheckpointError(
            f"{path} {what}. Give a Hugging Face folder, or the folder of a run that finished with checkpoint.export: "
            f"hf. `loong ckpt export {path} OUT` makes one from a native checkpoint."
        )
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder} holds no safetensors file. Pickled weights are not opened.")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise CheckpointError(
            f"{folder} holds no tokenizer, so a prompt cannot be read. Copy its tokenizer files there."
        )
    return folder


def continuation(
    folder: Path,
    prompt: str,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 50,
    seed: int = 0,
    chat: bool = False,
) -> str:
    """The text a model adds to `prompt`, without the prompt itself.

    `temperature` 0 takes the likeliest token each time; `top_k` 0 samples from all. The same seed gives the same text
    on the same machine. `chat` puts the prompt through the tokenizer's chat template as a user's message. `folder` is
    a Hugging Face folder or a run folder. Raises `CheckpointError` if it cannot be opened.
    """
    import torch

    model, tokenizer = _open(model_folder(Path(folder)))
    inputs = _encode(tokenizer, prompt, chat)
    length = inputs["input_ids"].shape[1]
    _require_room(model, length, max_new_tokens)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_k": top_k, "top_p": 1.0}
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        sampling["pad_token_id"] = tokenizer.eos_token_id
    # Rows of the vocabulary beyond the tokenizer's were never trained and stand for no text.
    if spare := list(range(len(tokenizer), model.config.vocab_size)):
        sampling["suppress_tokens"] = spare
    torch.manual_seed(seed)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
    # Decoded together and cut by the prompt's own text: a byte-level token alone may be half a character.
    tokens = output[0].tolist()
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    start = tokenizer.decode(tokens[:length], skip_special_tokens=True)
    return (
        whole[len(start) :] if whole.startswith(start) else tokenizer.decode(tokens[length:], skip_special_tokens=True)
    )


def _open(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise CheckpointError(f"{folder}: transformers cannot open it: {error}") from error
    return model.eval(), tokenizer


def _encode(tokenizer: Any, prompt: str, chat: bool) -> dict[str, Any]:
    if chat:
        if not tokenizer.chat_template:
            raise CheckpointError("The tokenizer has no chat template, so `chat` is impossible. Leave --chat out.")
        message = [{"role": "user", "content": prompt}]
        return dict(
            tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        )
    inputs = dict(tokenizer(prompt, return_tensors="pt", return_token_type_ids=False))
    if not inputs["input_ids"].shape[1]:
        if tokenizer.bos_token_id is None:
            raise CheckpointError("The prompt has no tokens, and this tokenizer has none to begin with. Give a prompt.")
        inputs = dict(tokenizer(tokenizer.bos_token, return_tensors="pt", return_token_type_ids=False))
    return inputs


def _require_room(model: Any, length: int, wanted: int) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length + wanted > limit:
        raise CheckpointError(
            f"The prompt's {length} tokens and {wanted} new ones exceed the model's {limit} positions. Allowed: at "
            f"most {max(0, limit - length)} new tokens for this prompt."
        )


def generate(
    folder: Annotated[Path, typer.Argument(help="A Hugging Face folder, or a run folder (its hf/).")],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among so many tokens; 0: all.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Use the tokenizer's chat template.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Continue a prompt with plain transformers.

    \b
    Examples:
      loong generate runs/demo "def fibonacci(n):" --max-new-tokens 60
      loong generate models/Qwen3-0.6B "Hello!" --chat --temperature 0
    """
    import subprocess

    settings = {
        "folder": str(model_folder(folder)),
        "prompt": prompt,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "seed": seed,
        "chat": chat,
    }
    command = [sys.executable, "-P", "-W", "ignore", "-m", "loong_llm.generate"]
    found = subprocess.run(command, input=json.dumps(settings), stdout=subprocess.PIPE, encoding="utf-8", check=False)
    if found.returncode:
        raise typer.Exit(found.returncode if found.returncode in (1, 2) else 1)
    text = json.loads(found.stdout)["continuation"]
    typer.echo(json.dumps(settings | {"continuation": text}, indent=2) if json_ else prompt + text)


def main() -> int:
    """Settings as JSON on standard input, the continuation as JSON on standard output. Exit code 0 or 2."""
    from loong_core.cli import output

    settings = json.load(sys.stdin)
    folder, prompt = Path(settings.pop("folder")), settings.pop("prompt")
    try:
        text = continuation(folder, prompt, **settings)
    except LoongError as error:
        return output.error(error)
    sys.stdout.write(json.dumps({"continuation": text}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
