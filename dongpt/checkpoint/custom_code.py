"""Generate the code of a model that no architecture of the transformers library computes, from model.py.

source = modeling_source()     # for modeling_dongpt.py, which transformers opens with trust_remote_code=True
"""

import ast
import inspect

import model

FILE_NAME = "modeling_dongpt.py"
AUTO_MAP = {"AutoConfig": "modeling_dongpt.DonGPTConfig", "AutoModelForCausalLM": "modeling_dongpt.DonGPTForCausalLM"}
# methods of GPT that decode and train
LEFT_OUT = "configure_optimizers parameter_groups flops_per_token generate stream logits_at __getstate__".split()
REPLACED_IMPORTS = '''
LayerCache = Any
Dropout = nn.Dropout


def rotate(q, k, cos, sin):
    """Rotate the channel pairs (i, i + hs/2) of q and k (B, T, nh, hs)."""
    halves = ((x, *x.chunk(2, dim=-1)) for x in (q, k))
    return tuple((x * cos + torch.cat([-x2, x1], dim=-1) * sin).to(x.dtype) for x, x1, x2 in halves)


def biased_attention(q, k, v, bias):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


'''
WRAPPER = '''

# ----------------------------------------------------------------------------------------------------------------------
# the model as the transformers library expects it

from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel, __version__  # noqa: E402
from transformers.modeling_outputs import CausalLMOutput  # noqa: E402

TIED = {"model.lm_head.weight": "model.transformer.wte.weight"}


class DonGPTConfig(PretrainedConfig):
    """model_args are the fields of GPTConfig."""

    model_type = "dongpt"

    def __init__(self, model_args=None, **kwargs):
        self.model_args = dict(model_args or {})
        config = GPTConfig(**self.model_args)
        self.vocab_size, self.hidden_size, self.num_hidden_layers = config.vocab_size, config.n_embd, config.n_layer
        self.num_attention_heads, self.max_position_embeddings = config.n_head, config.block_size
        kwargs = {**kwargs, "tie_word_embeddings": config.tie_weights, "use_cache": False}
        super().__init__(**kwargs)


class DonGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """The GPT above. Generation computes all tokens again at each step, without a KV cache."""

    config_class = DonGPTConfig
    base_model_prefix = "model"
    _tied_weights_keys = TIED if int(__version__.split(".")[0]) >= 5 else list(TIED)

    def __init__(self, config):
        super().__init__(config)
        self.model = GPT(GPTConfig(**config.model_args))
        if not config.tie_word_embeddings:
            self._tied_weights_keys = None
        self.post_init()

    def _init_weights(self, module):
        """Do nothing, because GPT initializes its weights."""

    def get_input_embeddings(self):
        return self.model.transformer.wte

    def set_input_embeddings(self, embeddings):
        self.model.transformer.wte = embeddings

    def get_output_embeddings(self):
        return self.model.lm_head

    def set_output_embeddings(self, head):
        self.model.lm_head = head

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        n = self.config.max_position_embeddings
        return {"input_ids": input_ids[:, -n:], "attention_mask": attention_mask}

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        if attention_mask is not None and not attention_mask.bool().all():
            raise ValueError("padding is not supported: pass sequences of the same length")
        logits, _ = self.model(input_ids, input_ids)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)
'''


def modeling_source() -> str:
    """Return the source code of model.py, without decoding and optimizers, with plain attention, and with WRAPPER."""
    source = inspect.getsource(model)
    lines, left_out = source.splitlines(), set[int]()
    tree = ast.parse(source)
    (gpt,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "GPT")
    ours = [n for n in tree.body if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("dongpt")]
    methods = [n for n in gpt.body if isinstance(n, ast.FunctionDef) and n.name in LEFT_OUT]
    assert len(methods) == len(LEFT_OUT), "model.py has changed: update LEFT_OUT"
    for node in (*ours, *methods):
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        left_out |= {*range(first - 1, node.end_lineno or first)}
    first_import = min(node.lineno for node in ours) - 1
    kept = [line for i, line in enumerate(lines) if i < first_import]
    kept += ["", *REPLACED_IMPORTS.strip("\n").splitlines(), "", ""]
    kept += [line for i, line in enumerate(lines) if i >= first_import and i not in left_out]
    return "\n".join(kept) + "\n" + WRAPPER
