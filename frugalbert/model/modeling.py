"""The encoder and its heads. Token ids come in, hidden states or task scores go out, as Hugging Face models do it.

One set of modules serves the three families of `Arch`: BERT (arXiv 1810.04805), 24hBERT's pre-norm form (arXiv
2104.07705) and ModernBERT's (arXiv 2412.13663). The masked-LM head, and the last layer if rows have as many each, work
at the masked positions only: most of the training speed of a small encoder. Weights equal those of stock `BertModel` /
`ModernBertModel` up to their names (`interop.py`).

Shapes: B batch, T tokens, D channels of the stream, V vocabulary, P masked positions, S a row's, C choices, L labels.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import ModelOutput, can_return_tuple

from .attention import PLAIN, Options, Output, Rows, rotary_tables
from .configuration import FrugalConfig
from .layers import ACTIVATIONS, Embeddings, FrugalLayer, PredictionHead, linear_of, norm_of, normed
from .losses import binary_loss, label_loss, masked_loss, sequence_loss, span_loss
from .sparse import masks_of


class FrugalPreTrainedModel(PreTrainedModel):
    config_class = FrugalConfig
    base_model_prefix = "model"
    _no_split_modules = ["Embeddings", "FrugalLayer"]
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal with `initializer_range`, biases 0, norms 1; the outputs of sublayers 0 if `zero_init_outputs`."""
        super()._init_weights(module)
        if isinstance(module, Output) and self.config.zero_init_outputs:
            init.zeros_(module.weight)


class FrugalModel(FrugalPreTrainedModel):
    """The encoder without a task head."""

    def __init__(self, config: FrugalConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        arch = config.to_arch()
        self.embeddings = Embeddings(config, arch)
        self.layers = nn.ModuleList([FrugalLayer(config, arch, index) for index in range(len(arch.layers))])
        self.patterns = {layer.pattern: layer.head_dim for layer in sorted(arch.layers, key=lambda x: -x.head_dim)}
        """Each attention pattern and the narrowest heads that have it."""
        self.final_norm = None if arch.family == "bert" else norm_of(arch, arch.hidden)
        pooled = add_pooling_layer and arch.family != "modern"
        self.pooler = nn.Linear(arch.hidden, arch.hidden) if pooled else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.word = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        options: Options = PLAIN,
    ) -> BaseModelOutputWithPooling:
        """All inputs (B, T). attention_mask: 0 = padding. document_ids: tokens see their own document only (0 =
        padding); then position_ids should restart with every document. Returns last_hidden_state (B, T, D), or
        (B, S, D) at `options.places`, pooler_output (B, D) in BERT families but for these, and with
        `output_hidden_states` the stream before each layer and after the last. Raises ValueError for more tokens than
        learned positions, or than the attention pattern knows."""
        gates, places = options
        x_BTD = self.embeddings(input_ids, token_type_ids, position_ids)
        device = x_BTD.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            # One dtype along the whole stream: mixed additions cost more than the matrix products of a small layer.
            x_BTD = x_BTD.to(torch.get_autocast_dtype(device))
        turns = torch.arange(x_BTD.shape[1], device=x_BTD.device)[None] if position_ids is None else position_ids
        rows = Rows(input_ids, attention_mask, position_ids, document_ids)
        visible = None if gates is None else rows.visible()
        dropout = self.training and self.config.attention_probs_dropout_prob > 0.0
        masks = masks_of(self.patterns, rows, x_BTD, self.config, dropout=dropout) if gates is None else {}
        rotaries: dict[tuple[int, float] | None, tuple[Tensor, Tensor] | None] = {None: None}
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states: tuple[Tensor, ...] = ()
        for index, layer in enumerate(self.layers):
            if keep:
                states += (x_BTD,)
            if layer.rotary not in rotaries:
                rotaries[layer.rotary] = rotary_tables(turns, *layer.rotary, x_BTD.dtype)
            mask = masks[layer.pattern] if gates is None else gates(index, visible)
            x_BTD = layer(x_BTD, mask, rotaries[layer.rotary], places if index + 1 == len(self.layers) else None)
        if self.final_norm is not None:
            x_BTD = normed(self.final_norm, x_BTD)
        return BaseModelOutputWithPooling(
            last_hidden_state=x_BTD,
            pooler_output=None if self.pooler is None or places is not None else torch.tanh(self.pooler(x_BTD[:, 0])),
            hidden_states=(*states, x_BTD) if keep else None,
        )


Judgement = tuple[Tensor, Tensor | None]
"""Logits, and the loss if there are labels."""

# ---- heads ---------------------------------------------------------------------------------------------------------


class _WordPredictor(FrugalPreTrainedModel):
    """What the two masked-LM heads share: the encoder and the scores of words, whose weights are the embeddings."""

    _tied_weights_keys = {"decoder.weight": "model.embeddings.word.weight"}

    def __init__(self, config: FrugalConfig, pooled: bool) -> None:
        super().__init__(config)
        arch = config.to_arch()
        self.model = FrugalModel(config, add_pooling_layer=pooled)
        self.head = PredictionHead(arch)
        self.decoder = nn.Linear(arch.hidden, config.vocab_size)

    def get_output_embeddings(self) -> nn.Linear:
        return self.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.decoder = new_embeddings

    def predict(
        self, x_BTD: Tensor, labels: Tensor | None, masked_positions: Tensor | None, loss_only: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Loss, if there are labels, and scores of words, at the masked positions or everywhere."""
        x = x_BTD if masked_positions is None else x_BTD.flatten(0, 1)
        if masked_positions is not None and masked_positions.dim() == 1:  # of (B, S) there are no other states
            x = x.index_select(0, masked_positions)
        x = self.head(x)
        if labels is None:
            return None, self.decoder(x)
        loss, logits = masked_loss(x.flatten(0, -2), self.decoder, labels.flatten(), loss_only)
        return loss, None if logits is None else logits.view(*x.shape[:-1], -1)


class FrugalForMaskedLM(_WordPredictor):
    """Predicts masked tokens; output weights are the word embeddings."""

    _keys_to_ignore_on_load_unexpected = [r"pooler\.", r"^pair\."]

    def __init__(self, config: FrugalConfig) -> None:
        super().__init__(config, pooled=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        masked_positions: Tensor | None = None,
        loss_only: bool = False,
        **inputs: Any,
    ) -> MaskedLMOutput:
        """With masked_positions (P,), indices into the flattened (B*T), or (B, S), which spares the last layer other
        places: logits (P, V), labels (P,). Without: logits (B, T, V), labels (B, T). Labels -100 do not count; the loss
        is a mean over the others. With labels, take gradients from the loss, not from the logits; with `loss_only`
        there are none, which saves their memory. `inputs`: the encoder's others."""
        if masked_positions is not None and masked_positions.dim() == 2:
            inputs["options"] = inputs.get("options", PLAIN)._replace(places=masked_positions)
        outputs = self.model(input_ids, attention_mask, token_type_ids, position_ids, return_dict=True, **inputs)
        loss, logits = self.predict(outputs.last_hidden_state, labels, masked_positions, loss_only)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


@dataclass
class PairsOutput(ModelOutput):
    """Losses of masked words and of pairs, their sum, and the scores."""

    loss: Tensor | None = None
    masked_loss: Tensor | None = None
    pair_loss: Tensor | None = None
    logits: Tensor | None = None
    pair_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class FrugalForPairs(_WordPredictor):
    """Predicts masked tokens, and of two segments whether the second is random (BERT) or swapped (ALBERT)."""

    def __init__(self, config: FrugalConfig) -> None:
        super().__init__(config, pooled=True)
        self.pair = nn.Linear(config.to_arch().hidden, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        masked_positions: Tensor | None = None,
        pair_labels: Tensor | None = None,
        loss_only: bool = False,
        **inputs: Any,
    ) -> PairsOutput:
        """As FrugalForMaskedLM; pair_labels (B,), 1 = random or swapped. pair_logits (B, 2) come from the pooler, in
        `modern` from the first token through the prediction head."""
        outputs = self.model(input_ids, attention_mask, token_type_ids, return_dict=True, **inputs)
        x_BTD, pooled_BD = outputs.last_hidden_state, outputs.pooler_output
        masked, logits = self.predict(x_BTD, labels, masked_positions, loss_only)
        pair_logits_B2 = self.pair(self.head(x_BTD[:, 0]) if pooled_BD is None else pooled_BD)
        pair = None if pair_labels is None else label_loss(pair_logits_B2, pair_labels)
        losses = [loss for loss in (masked, pair) if loss is not None]
        return PairsOutput(
            loss=torch.stack(losses).sum() if losses else None, masked_loss=masked, pair_loss=pair,
            logits=logits, pair_logits=pair_logits_B2, hidden_states=outputs.hidden_states,
        )  # fmt: skip


class _Judge(FrugalPreTrainedModel):
    """What the heads with one kind of labels share; `judge` makes logits and loss of the encoder's outputs."""

    model: FrugalModel
    returns: Any = TokenClassifierOutput

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> ModelOutput:
        """Inputs (B, T), of choices (B, C, T). Labels and logits: see the class. `inputs`: the encoder's others."""
        given = (input_ids, attention_mask, token_type_ids, position_ids)
        ids, mask, types, positions = (None if x is None else x.flatten(0, -2) for x in given)
        outputs = self.model(ids, mask, types, positions, return_dict=True, **inputs)
        logits, loss = self.judge(outputs, mask, labels, input_ids.shape)
        return self.returns(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class FrugalForReplacedTokenDetection(_Judge):
    """ELECTRA's discriminator (arXiv 2003.10555): was this token replaced? labels (B, T): 1 = replaced, 0 = original,
    -100 = does not count (nor does padding). Logits (B, T)."""

    def __init__(self, config: FrugalConfig) -> None:
        super().__init__(config)
        arch = config.to_arch()
        self.model = FrugalModel(config, add_pooling_layer=False)
        self.dense = linear_of(arch, arch.hidden, arch.hidden)
        self.activation = ACTIVATIONS[arch.activation]
        self.classifier = nn.Linear(arch.hidden, 1)
        self.post_init()

    def judge(self, outputs: Any, mask: Tensor | None, labels: Tensor | None, shape: torch.Size) -> Judgement:
        logits_BT = self.classifier(self.activation(self.dense(outputs.last_hidden_state))).squeeze(-1)
        return logits_BT, None if labels is None else binary_loss(logits_BT, labels, mask)


class _Classifier(FrugalPreTrainedModel):
    """What the task heads share: encoder, dropout, and in `modern` a prediction head before the last layer."""

    def __init__(self, config: FrugalConfig, num_outputs: int, pooled: bool) -> None:
        super().__init__(config)
        arch = config.to_arch()
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.model = FrugalModel(config, add_pooling_layer=pooled)
        self.head = PredictionHead(arch) if arch.family == "modern" else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(arch.hidden, num_outputs)
        self.post_init()

    def score(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.head(x)))

    def pool(self, outputs: BaseModelOutputWithPooling, attention_mask: Tensor | None) -> Tensor:
        """(B, D): BERT's pooler, or in `modern` the first token or the mean of the real ones."""
        if outputs.pooler_output is not None:
            return outputs.pooler_output
        x_BTD = outputs.last_hidden_state
        if self.config.classifier_pooling == "cls":
            return x_BTD[:, 0]
        if attention_mask is None:
            return x_BTD.mean(1)
        real = attention_mask[:, :, None].to(x_BTD.dtype)
        return (x_BTD * real).sum(1) / real.sum(1).clamp(min=1)


class FrugalForSequenceClassification(_Classifier, _Judge):
    """Classes, several labels at once, or numbers for a text, by `config.problem_type` as in Hugging Face.

    labels (B,) classes, (B,) or (B, L) numbers, or (B, L) zeros and ones. Logits (B, L)."""

    returns = SequenceClassifierOutput

    def __init__(self, config: FrugalConfig) -> None:
        super().__init__(config, config.num_labels, pooled=True)

    def judge(self, outputs: Any, mask: Tensor | None, labels: Tensor | None, shape: torch.Size) -> Judgement:
        logits_BL = self.score(self.pool(outputs, mask))
        return logits_BL, None if labels is None else sequence_loss(logits_BL, labels, self.config.problem_type)


class FrugalForMultipleChoice(_Classifier, _Judge):
    """Which of C continuations is right? Inputs (B, C, T), labels (B,) indices of the right choice. Logits (B, C)."""

    returns = MultipleChoiceModelOutput

    def __init__(self, config: FrugalConfig) -> None:
        super().__init__(config, 1, pooled=True)

    def judge(self, outputs: Any, mask: Tensor | None, labels: Tensor | None, shape: torch.Size) -> Judgement:
        logits_BC = self.score(self.pool(outputs, mask)).view(shape[:2])
        return logits_BC, None if labels is None else label_loss(logits_BC, labels)


class FrugalForTokenClassification(_Classifier, _Judge):
    """A class for every token. labels (B, T), -100 = does not count. Logits (B, T, L)."""

    def __init__(self, config: FrugalConfig) -> None:
        super().__init__(config, config.num_labels, pooled=False)

    def judge(self, outputs: Any, mask: Tensor | None, labels: Tensor | None, shape: torch.Size) -> Judgement:
        logits_BTL = self.score(outputs.last_hidden_state)
        return logits_BTL, None if labels is None else label_loss(logits_BTL.flatten(0, 1), labels.flatten())


class FrugalForQuestionAnswering(_Classifier):
    """Start and end of the answer in the text."""

    def __init__(self, config: FrugalConfig) -> None:
        super().__init__(config, 2, pooled=False)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **inputs: Any,
    ) -> QuestionAnsweringModelOutput:
        """start_positions, end_positions (B,); one outside the input does not count. Logits (B, T) each."""
        outputs = self.model(input_ids, attention_mask, token_type_ids, position_ids, return_dict=True, **inputs)
        start_BT, end_BT = self.score(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (span_loss(start_BT, start_positions) + span_loss(end_BT, end_positions)) / 2
        return QuestionAnsweringModelOutput(
            loss=loss, start_logits=start_BT, end_logits=end_BT, hidden_states=outputs.hidden_states
        )


FrugalConfig.register_for_auto_class("AutoConfig")
FrugalModel.register_for_auto_class("AutoModel")
FrugalForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
FrugalForPairs.register_for_auto_class("AutoModelForPreTraining")
FrugalForReplacedTokenDetection.register_for_auto_class("AutoModelForPreTraining")
FrugalForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
FrugalForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
FrugalForMultipleChoice.register_for_auto_class("AutoModelForMultipleChoice")
FrugalForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
