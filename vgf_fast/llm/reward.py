"""Reward models: the reward of a response, and its gradient with respect to the response's token embeddings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vgf_fast.llm.chunks import run_in_chunks
from vgf_fast.llm.result import Usage
from vgf_fast.llm.vocabulary import Vocabulary, pad_ids

Padding = Literal["auto", "left", "right"]


class Reward:
    """Reward of (prompt, response), differentiable in the response's embeddings.

    A row is ``prefix + prompt + response + suffix``; prefix and suffix are the tokenizer's own special tokens unless
    given. Everything but the response is frozen. Rows are padded, chunked by ``max_tokens`` and evaluated in
    float32-in, float32-out; the model may be of another dtype.
    """

    name = "reward"

    def __init__(
        self,
        forward: Callable[[Tensor, Tensor], Tensor],
        tokenizer: Any,
        table: Tensor,
        *,
        padding: Literal["left", "right"],
        max_tokens: int,
        max_length: int | None,
        prefix: Sequence[int] | None,
        suffix: Sequence[int] | None,
        parameters: int | None,
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}, expected a positive number of tokens a pass")
        self._forward = forward
        self.table = table.detach()  # [V, d], the embedding of every token
        self.vocabulary = Vocabulary(tokenizer, len(table)).to(table.device)
        self.padding = padding
        self.max_tokens = max_tokens
        self.max_length = max_length
        self.prefix = list(self.vocabulary.prefix if prefix is None else prefix)
        self.suffix = list(self.vocabulary.suffix if suffix is None else suffix)
        self.parameters = parameters  # weights that a token's forward pass multiplies with, for counting operations

    @property
    def device(self) -> torch.device:
        """Where the embeddings are."""
        return self.table.device

    def embed(self, ids: Tensor) -> Tensor:
        """float32 embeddings [..., d] of ids [...]."""
        return self.table[ids].float()

    def check_length(self, prompt: Sequence[int], response_length: int) -> None:
        """Raise ``ValueError`` when a row with a response of this length would not fit into the model."""
        total = len(self.prefix) + len(prompt) + response_length + len(self.suffix)
        if self.max_length is not None and total > self.max_length:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and a response of {response_length} make {total} with the special "
                f"tokens, but {self.name} reads at most {self.max_length}: shorten them"
            )

    def evaluate(
        self,
        prompts: Sequence[list[int]],
        responses: Sequence[list[int]],
        *,
        embeddings: Tensor | None = None,
        gradient: bool = False,
        usage: Usage | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Rewards [R] of R rows of ids, and their gradient [R, T, d] where asked for, float32.

        ``embeddings`` [R, T, d] stand in for the responses' own (T the longest response; beyond a row's own length
        they are not read, and the gradient is zero). ``usage`` counts the passes.

        Raises ``ValueError`` for an empty prompt or response, a row that is too long, rewards of a wrong shape or not
        finite.
        """
        for prompt, response in zip(prompts, responses, strict=True):
            if not prompt or not response:
                raise ValueError(f"{'response' if prompt else 'prompt'} is empty, expected at least one token")
            self.check_length(prompt, len(response))
        rows = [[*self.prefix, *p, *r, *self.suffix] for p, r in zip(prompts, responses, strict=True)]
        rewards = torch.zeros(len(rows), dtype=torch.float32, device=self.device)
        longest = max(map(len, responses), default=0)
        shape = (len(rows), longest, self.table.shape[1])
        gradients = torch.zeros(shape, dtype=torch.float32, device=self.device) if gradient else None

        def run(chunk: list[int]) -> None:
            chosen = [rows[i] for i in chunk]
            ids, mask = pad_ids(chosen, 0, self.padding, self.device)
            own = [len(responses[i]) for i in chunk]
            left = self.padding == "left"
            starts = [
                (ids.shape[1] - len(row) if left else 0) + len(self.prefix) + len(prompts[i])
                for i, row in zip(chunk, chosen, strict=True)
            ]
            with torch.set_grad_enabled(gradient):
                whole = self.embed(ids)
                if embeddings is not None:
                    for row, (i, start, length) in enumerate(zip(chunk, starts, own, strict=True)):
                        whole[row, start : start + length] = embeddings[i, :length].detach()
                if gradient:
                    whole.requires_grad_()
                values = self._checked(self._forward(whole, mask), len(chunk))
                if gradient:
                    (found,) = torch.autograd.grad(values.sum(), whole)
            rewards[chunk] = values.detach()
            if gradients is not None:
                for row, (i, start, length) in enumerate(zip(chunk, starts, own, strict=True)):
                    gradients[i, :length] = found[row, start : start + length]
            if usage is not None:
                usage.reward_forward += len(chunk)
                usage.reward_backward += len(chunk) * gradient
                usage.reward_tokens += sum(map(len, chosen)) * (2 if gradient else 1)

        run_in_chunks(self.name, [len(row) for row in rows], self.max_tokens, run)
        return rewards, gradients

    def _checked(self, values: object, rows: int) -> Tensor:
        if not isinstance(values, Tensor):
            raise ValueError(f"{self.name} returned {type(values).__name__}, expected a tensor of shape ({rows},)")
        if values.shape not in ((rows,), (rows, 1)):
            raise ValueError(f"{self.name} returned shape {tuple(values.shape)}, expected ({rows},): one reward a row")
        values = values.reshape(rows).float()
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{self.name} returned {values.detach().tolist()}, expected finite rewards")
        return values


class CallableReward(Reward):
    """A reward given as a function of (embeddings [R, S, d] float32, mask [R, S]) that returns [R].

    ``table`` [V, d]: the embeddings of ``tokenizer``'s tokens, in the space that the function reads. ``padding``: the
    side on which the function wants short rows filled. ``parameters``: weights a token's forward pass multiplies with,
    where passes are to be compared in operations.
    """

    name = "the reward function"

    def __init__(
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        tokenizer: Any,
        table: Tensor,
        *,
        padding: Literal["left", "right"] = "right",
        max_tokens: int = 16384,
        max_length: int | None = None,
        prefix: Sequence[int] | None = None,
        suffix: Sequence[int] | None = None,
        parameters: int | None = None,
    ) -> None:
        if padding not in ("left", "right"):
            raise ValueError(f"padding is {padding!r}, expected 'left' or 'right'")
        super().__init__(
            function,
            tokenizer,
            table,
            padding=padding,
            max_tokens=max_tokens,
            max_length=max_length,
            prefix=prefix,
            suffix=suffix,
            parameters=parameters,
        )


class RewardModel(Reward):
    """A sequence classifier of transformers with one output (or output ``label`` of several) that takes embeddings.

    ``padding="auto"`` finds the side on which a filled row gets the reward of the row alone: models that read the last
    position want the left, encoders with absolute positions the right. ``checkpointing`` recomputes activations in the
    backward pass. ``max_tokens``: padded tokens a pass.

    Raises ``ValueError`` for a model that refuses ``inputs_embeds``, that has no padding token, several outputs and no
    ``label``, or that gets filled rows wrong on either side.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        label: int | None = None,
        padding: Padding = "auto",
        max_tokens: int = 16384,
        checkpointing: bool = False,
        prefix: Sequence[int] | None = None,
        suffix: Sequence[int] | None = None,
    ) -> None:
        self.name = type(model).__name__
        if padding not in ("auto", "left", "right"):
            raise ValueError(f"padding is {padding!r}, expected 'auto', 'left' or 'right'")
        config: Any = model.config
        if getattr(config, "pad_token_id", None) is None:
            raise ValueError(
                f"{self.name} has config.pad_token_id None, expected a token: set model.config.pad_token_id = "
                "tokenizer.pad_token_id (tokenizer.pad_token = tokenizer.eos_token where it has none)"
            )
        accepted = inspect.signature(model.forward).parameters
        if "inputs_embeds" not in accepted or getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"{self.name} does not take inputs_embeds, expected a model whose input can be moved")
        outputs = int(getattr(config, "num_labels", 1))
        if label is None and outputs != 1:
            raise ValueError(f"{self.name} has {outputs} outputs: give label, the one that is the reward")
        if label is not None and not 0 <= label < outputs:
            raise ValueError(f"label is {label}, expected 0 to {outputs - 1}: {self.name} has {outputs} outputs")
        self.model = model.eval().requires_grad_(False)
        self._takes_positions = "position_ids" in accepted
        self._label = label or 0
        get_embedding: Any = model.get_input_embeddings
        embedding: nn.Module = get_embedding()
        weight: Any = embedding.weight
        with torch.no_grad():
            # Through the module, not its weight: some families scale their embeddings.
            table = embedding(torch.arange(len(weight), device=weight.device))
        self._dtype = table.dtype
        body = sum(p.numel() for p in model.parameters()) - weight.numel()
        super().__init__(
            self._classify,
            tokenizer,
            table,
            padding="right",
            max_tokens=max_tokens,
            max_length=context_length(config),
            prefix=prefix,
            suffix=suffix,
            parameters=body,
        )
        self.padding = self._find_padding() if padding == "auto" else padding
        if checkpointing:
            self._checkpoint()

    def _classify(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        arguments: dict[str, Any] = {"inputs_embeds": embeddings.to(self._dtype), "attention_mask": mask}
        if self._takes_positions and self.padding == "left":
            arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
        try:
            logits: Tensor = self.model(**arguments).logits
        except NotImplementedError as error:
            raise ValueError(f"{self.name} does not take inputs_embeds ({error})") from error
        return logits[:, self._label]

    def _probe(self, lengths: Sequence[int]) -> Tensor:
        """Rewards of rows of these lengths, made of allowed tokens spread over the vocabulary."""
        ids = self.vocabulary.allowed.nonzero().flatten()
        rows = [ids[torch.arange(1, n + 1, device=ids.device) * 7919 % len(ids)].tolist() for n in lengths]
        tokens, mask = pad_ids(rows, 0, self.padding, self.device)
        with torch.no_grad():
            return self._classify(self.embed(tokens), mask).float()

    def _find_padding(self) -> Literal["left", "right"]:
        lengths = (3, 7)
        error: dict[Literal["left", "right"], float] = {}
        scale = 0.0
        for side in ("right", "left"):
            self.padding = side
            alone = torch.cat([self._probe([n]) for n in lengths])
            error[side] = float((self._probe(lengths) - alone).abs().max())
            scale = max(scale, float(alone.abs().max()))
        # Rounding is all that may differ; of two good sides the right one, which needs no positions.
        rounding = (1 + scale) * torch.finfo(self._dtype).eps * 32
        if min(error.values()) > rounding:
            raise ValueError(
                f"{self.name} gives filled rows another reward on either side (off by {error['right']:.2g} on the "
                f"right, {error['left']:.2g} on the left): give padding"
            )
        return "left" if error["left"] * 10 < error["right"] else "right"

    def _checkpoint(self) -> None:
        before = self._probe([7])
        model: Any = self.model
        # Its name from transformers 5.23 on, and the one before.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
        for module in self.model.modules():
            # Layers look at their own flag; their children stay in evaluation, dropout off.
            if getattr(module, "gradient_checkpointing", False):
                module.training = True
        if not torch.equal(self._probe([7]), before):
            raise ValueError(f"{self.name} gives another reward with checkpointing (dropout?), expected the same")


def context_length(config: Any) -> int | None:
    """Longest row that a model of this configuration reads, or None where it does not say."""
    for name in ("n_positions", "max_position_embeddings", "max_seq_len"):
        found = getattr(config, name, None)
        if isinstance(found, int) and found > 0:
            # RoBERTa counts positions from its padding token on.
            offset = "roberta" in config.model_type or config.model_type in ("camembert", "xmod", "data2vec-text")
            return found - (config.pad_token_id + 1 if offset else 0)
    return None
