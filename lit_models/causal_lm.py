"""`LitCausalLM`: a transformers causal language model as a LightningModule, built from plain config values.

Everything a user edits first: what the loss is, what is logged, which parameters decay. It knows
nothing of sharding. The model is built on the meta device and the strategy gives every rank its part;
with another strategy, `build_device: cpu` builds a whole model with random weights.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_npu_tp import ConfigError, weights_from
from lightning_npu_tp.weights.safetensors_reader import told_of_adapter
from lit_models.metrics import TokenLoss, TokenPerplexity
from lit_models.optim import NO_WEIGHT_DECAY, weight_decay_groups
from lit_models.token_mean import TokenMean

IGNORED_LABEL = -100


class LitCausalLM(LightningModule):
    """Trains a causal language model on batches of input_ids and labels, both int64 [B, S].

    Labels lie aligned with input_ids (the model shifts them once); -100 is not counted. Further
    entries of a batch (position_ids, attention_mask, token_mask) are handed to the model.

    architecture:    a supported transformers model type, e.g. "deepseek_v2".
    config:          values of that model's transformers config.
    path:            Hugging Face folder with weights to start from; its config.json then stands for `architecture` and
                     `config`. Code that lies in it is never run.
    config_overrides: values that win over the folder's config.json or `config`, such as aux_loss_alpha; a changed
                     size no longer fits the weights.
    optimizer:       called with parameter groups, e.g. a partial torch.optim.AdamW; None for a module
                     that only validates or predicts.
    scheduler:       called with the optimizer, returns a scheduler stepped after each optimizer step;
                     None keeps the rate. A `total_steps` it leaves open is filled from the trainer.
    aux_loss_weight: factor on the model's own balance loss, which its config has scaled already
                     (aux_loss_alpha); 0 leaves it out.
    no_weight_decay: patterns of parameter names without weight decay.
    build_device:    "meta" for a strategy that fills the parameters; "cpu" for one that does not.

    Logs train/loss (true token mean of the optimizer step), train/grad_norm (before clipping), val/loss and
    val/perplexity, test/…
    Raises ConfigError for an architecture or config value that is not supported.
    """

    def __init__(
        self,
        *,
        architecture: str | None = None,
        config: Mapping[str, Any] | None = None,
        path: str | None = None,
        config_overrides: Mapping[str, Any] | None = None,
        optimizer: Callable[..., Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        aux_loss_weight: float = 1.0,
        no_weight_decay: Sequence[str] = NO_WEIGHT_DECAY,
        build_device: str = "meta",
    ) -> None:
        super().__init__()
        # Plain containers: a config library's own ones in a checkpoint's hyperparameters cannot be loaded safely.
        no_weight_decay = _plain(no_weight_decay)
        if path is not None:
            architecture, config = read_folder_config(path)
        if architecture is None or config is None:
            raise ConfigError(
                "The model is not said: set model.path to a Hugging Face folder, or both model.architecture and "
                "model.config."
            )
        config = _plain(config) | _plain(config_overrides or {})
        # With what the folder and the changes came to, a checkpoint can be loaded without them.
        self.save_hyperparameters("aux_loss_weight", "no_weight_decay", "build_device")
        self.save_hyperparameters({"architecture": architecture, "config": config})
        self.model_config = _model_config(architecture, dict(config))
        if getattr(self.model_config, "output_router_logits", False):
            raise ConfigError(
                "output_router_logits=true in the model's config adds transformers' balance loss to each micro-batch's "
                "loss, which here is divided by the tokens of the step. Set output_router_logits to false; "
                "aux_loss_alpha balances the experts layer by layer."
            )
        self._path = path
        self.aux_loss_weight = aux_loss_weight
        self.no_weight_decay = no_weight_decay
        self._build_device = build_device
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._token_mean = TokenMean(self._mean_over_data)
        self.val_loss, self.val_perplexity = TokenLoss(), TokenPerplexity()
        self.test_loss, self.test_perplexity = TokenLoss(), TokenPerplexity()
        self.model: torch.nn.Module | None = None

    @override
    def configure_model(self) -> None:
        """Build the model once; Lightning calls it before every fit, validate, test and predict."""
        if self.model is not None:
            return
        from transformers import AutoModelForCausalLM

        if self._path is not None and self._build_device != "meta":
            self.model = AutoModelForCausalLM.from_pretrained(self._path, config=self.model_config)
            return
        with torch.device(self._build_device):
            self.model = AutoModelForCausalLM.from_config(self.model_config)
        if self._path is not None:
            weights_from(self.model, self._path)

    # --- training ------------------------------------------------------------------------------

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Summed loss over the window's divisor; see `TokenMean` for why it is no mean of the batch."""
        tokens = _count(batch)
        divisor = self._token_mean.divisor(tokens, batch["labels"].numel(), self.trainer.accumulate_grad_batches)
        outputs = self._model(**batch, num_items_in_batch=divisor)
        self._token_mean.add_loss(outputs.loss.detach() * divisor)
        aux_loss = getattr(outputs, "aux_loss", None)
        if aux_loss is None or self.aux_loss_weight == 0:
            return outputs.loss
        # A mean over this micro-batch's tokens, so it weighs as many tokens as the micro-batch has.
        return outputs.loss + self.aux_loss_weight * aux_loss * tokens / divisor

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Finish the gradients, before they are clipped, and log the step's loss."""
        self._token_mean.rescale(self.parameters())
        self.log("train/loss", self._token_mean.loss())
        self._token_mean.reset()

    @override
    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip as the trainer says, and log the norm that was found on the way."""
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        norm = getattr(self.trainer.precision_plugin, "grad_norm", None)
        if norm is not None:
            self.log("train/grad_norm", norm)

    @override
    def on_train_epoch_start(self) -> None:
        """A window never crosses epochs, nor two fits of which the first was stopped in the middle."""
        self._token_mean.reset()

    @override
    def configure_optimizers(self) -> Any:
        """The optimizer over two groups, with and without weight decay, and its schedule per step."""
        if self._optimizer is None:
            raise ConfigError("optimizer=None cannot train. Give the model an optimizer, e.g. a partial AdamW.")
        optimizer = self._optimizer(weight_decay_groups(self.named_parameters(), self.no_weight_decay))
        if self._scheduler is None:
            return optimizer
        scheduler = self._scheduler(optimizer, **self._open_total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _open_total_steps(self) -> dict[str, int]:
        """`total_steps` for a scheduler that takes it and was not given it."""
        assert self._scheduler is not None
        bound = getattr(self._scheduler, "keywords", {})
        if bound.get("total_steps") is not None or "total_steps" not in inspect.signature(self._scheduler).parameters:
            return {}
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ConfigError(
                "The schedule needs the number of optimizer steps, but this run has no end (trainer.max_steps=-1 and "
                "trainer.max_epochs=-1). Set trainer.max_steps, scheduler.total_steps or scheduler=constant."
            )
        return {"total_steps": int(steps)}

    # --- evaluation ----------------------------------------------------------------------------

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Token-weighted loss and perplexity of the validation set, logged under val/."""
        self._evaluate(batch, "val", self.val_loss, self.val_perplexity)

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Token-weighted loss and perplexity of the test set, logged under test/."""
        self._evaluate(batch, "test", self.test_loss, self.test_perplexity)

    def _evaluate(self, batch: dict[str, Tensor], stage: str, loss: TokenLoss, perplexity: TokenPerplexity) -> None:
        nll, tokens = self._model(**batch, num_items_in_batch=1).loss, _count(batch)
        loss.update(nll, tokens)
        perplexity.update(nll, tokens)
        self.log_dict({f"{stage}/loss": loss, f"{stage}/perplexity": perplexity}, on_step=False, on_epoch=True)

    @override
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Score text: log-likelihood of each token after those before it.

        Returns log_likelihood, at least float32 [B, S - 1] (of input_ids[:, 1:]), and counted, bool
        of the same shape.
        """
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = self._model(**inputs).logits[:, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        likelihood = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        labels = batch.get("labels", batch["input_ids"])
        return {"log_likelihood": likelihood, "counted": labels[:, 1:] != IGNORED_LABEL}

    # --- helpers -------------------------------------------------------------------------------

    @property
    def _model(self) -> torch.nn.Module:
        assert self.model is not None, "configure_model has not run"
        return self.model

    def _mean_over_data(self, value: Tensor) -> Tensor:
        # The strategy knows which ranks see different data; tensor ranks see the same.
        return self.trainer.strategy.reduce(value, reduce_op="mean")


def _count(batch: Mapping[str, Tensor]) -> Tensor:
    """Number of labels that count, as a scalar on the batch's device; the first has no logit to be held against."""
    return (batch["labels"][:, 1:] != IGNORED_LABEL).sum()


def _plain(value: Any) -> Any:
    """Dicts and lists all the way down, whatever kind of container came in."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def read_folder_config(path: str) -> tuple[str, dict[str, Any]]:
    """model_type and the other values of a folder's config.json. Raises ConfigError for one that is no config."""
    hub, separator, repository = path.partition("://")
    if separator:
        hub = f" --from {hub}" if hub == "modelscope" else ""
        raise ConfigError(
            f"model.path={path} is an address, and ranks fetch nothing. Run `lightning-npu-tp download {repository} "
            f"FOLDER{hub}`, then set model.path=FOLDER."
        )
    file = Path(path) / "config.json"
    if not file.exists() and (told := told_of_adapter(Path(path))):
        raise ConfigError(f"model.path={told}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        architecture = values.pop("model_type")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"model.path={path} is no Hugging Face folder: {file} "
            f"{'does not exist' if isinstance(error, FileNotFoundError) else f'cannot be used ({error!r})'}. Give the "
            f"folder with config.json and the safetensors files; `lightning-npu-tp download` fetches one."
        ) from error
    if (quantised := values.get("quantization_config")) is not None:
        raise ConfigError(
            f"model.path={path} holds quantised weights ({quantised.get('quant_method', 'of an unknown kind')}), which "
            f"cannot be trained. Take the unquantised model, or convert it to bfloat16 first."
        )
    # Of the code that came with the folder: ours is used.
    for key in ("auto_map", "architectures", "transformers_version", "torch_dtype", "dtype"):
        values.pop(key, None)
    return architecture, values


def _model_config(architecture: str, values: dict[str, Any]) -> Any:
    """The transformers config; unsupported names and refused values become errors that say which."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from lightning_npu_tp.models import supported
    from lightning_npu_tp.models.token_ids import require_padding_in_vocabulary

    if architecture not in supported():
        raise ConfigError(
            f"model.architecture={architecture!r} is not supported. Set it to one of: {', '.join(supported())}."
        )
    try:
        # A copy: transformers writes into nested dictionaries, and the hyperparameters should stay what was given.
        config = AutoConfig.for_model(architecture, **_plain(values))
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ConfigError(f"model.config is refused by transformers' {architecture} config: {error}") from error
    require_padding_in_vocabulary(config, "The model's config")
    return config
