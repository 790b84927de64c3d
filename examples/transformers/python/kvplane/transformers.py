"""kvplane as the KV cache of Hugging Face transformers.

    import kvplane.transformers                       # registers the attention implementation "kvplane"
    model.set_attn_implementation("kvplane")          # or attn_implementation="kvplane" in from_pretrained()
    cache = kvplane.transformers.Cache(model.config, "standard")
    model.generate(**inputs, past_key_values=cache)

A layer of the cache hands new keys and values on without storing them. The attention function stores them, together
with the queries of the same tokens, from which some recipes learn, and attends on the packed bits. Tokens of left
padding enter no cache. Drafts of assisted decoding are stored so that taking them back leaves no trace.

What it does not serve is refused with kvplane.Error: another attention implementation, models with other layers than
full and sliding-window attention, masks beyond causal ones with left padding, offloading, devices other than the CPU
and CUDA's, gradients, attention weights.

On a CUDA device, of a build that has them (kvplane.cuda_devices()), keys and values stay there, in packed bits, and a
step waits for nothing but what generate() itself asks for.
"""
from __future__ import annotations

import os
from numbers import Integral
from typing import Any, Sequence

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache as _TransformersCache
from transformers.cache_utils import CacheLayerMixin, get_layer_types_and_kwargs
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from . import Cache as _Cache
from . import Error, Layer, Policy, Rope

__all__ = ["ATTENTION", "Cache", "CacheLayer", "layers_of"]

#: The name of the attention implementation.
ATTENTION = "kvplane"

#: How many of the last tokens may be drafts. Assisted decoding drafts 20 at a time unless it is told otherwise.
MOST_DRAFTS = 128

_LAYER_TYPES = ("full_attention", "sliding_attention")
_DEVICES = ("cpu", "cuda")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_NOT_GIVEN = object()


def _refuse(code: str, sentence: str) -> None:
    error = Error(sentence)
    error.code = code
    raise error


def _require(condition: bool, code: str, sentence: str) -> None:
    if not condition:
        _refuse(code, sentence)


def _is_whole(number: Any) -> bool:
    return isinstance(number, Integral) or torch.is_tensor(number) and not number.is_floating_point()


# What a model is -----------------------------------------------------------------------------------------------------

def _rope_of(config: Any, layer_type: str, head_dim: int) -> Rope | None:
    """The rotary embedding of a layer. Only how well keys are stored by some recipes depends on it, not what attention
    is: so the frequencies that change with the length of a sequence are taken as they are at first."""
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        return None
    parameters = parameters.get(layer_type, parameters)
    if not parameters:
        return None
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        share = parameters.get("partial_rotary_factor", 1.0)
        return Rope(float(parameters["rope_theta"]), dims=0 if share == 1.0 else int(head_dim * share))
    by_type = layer_type in config.rope_parameters
    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](config, "cpu", **({"layer_type": layer_type} if by_type else {}))
    return Rope(frequencies=[float(f) for f in frequencies])


def layers_of(config: transformers.PreTrainedConfig) -> list[Layer]:
    """What kvplane must know of the layers of a model. Raises Error (option) for what it does not serve."""
    _require(not getattr(config, "is_encoder_decoder", False), "option",
             f"model '{config.model_type}': an encoder and a decoder, expected a decoder alone")
    config = config.get_text_config(decoder=True)
    types, _ = get_layer_types_and_kwargs(config)
    layers = []
    for index, (kind, layer) in enumerate(zip(types, config.per_layer_config)):
        _require(kind in _LAYER_TYPES, "option",
                 f"model '{config.model_type}': layer {index} is of type '{kind}', expected "
                 f"{' or '.join(_LAYER_TYPES)}")
        _require(getattr(layer, "kv_lora_rank", None) is None, "option",
                 f"model '{config.model_type}': multi-head latent attention, which expands what it caches; expected "
                 "keys and values that are attended to as they are cached")
        query_heads = layer.num_attention_heads
        head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // query_heads
        layers.append(Layer(kv_heads=getattr(layer, "num_key_value_heads", None) or query_heads,
                            query_heads=query_heads, head_dim=head_dim, rope=_rope_of(layer, kind, head_dim),
                            sliding_window=layer.sliding_window if kind == "sliding_attention" else 0))
    return layers


# What goes from a cache to the attention function --------------------------------------------------------------------

class _Handed(torch.Tensor):
    """New keys or values on their way from the cache to the attention function. Nothing can be computed with them on
    the way, so that no attention of another implementation takes them for all keys there are."""

    @staticmethod
    def of(tensor: torch.Tensor, layer: "CacheLayer") -> "_Handed":
        handed = torch.Tensor._make_subclass(_Handed, tensor)
        handed.kvplane_layer = layer
        return handed

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("__get__", "size", "dim", "stride", "is_contiguous", "numel",
                                                 "__repr__"):
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        _refuse("option",
                f"torch's {getattr(function, '__name__', function)}() of keys or values that a kvplane cache holds; "
                f"expected that they go to the attention implementation '{ATTENTION}' as they are")


def _exact_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, padding: list[int],
                     scale: float | None, sliding_window: int) -> torch.Tensor:
    """Attention of a prompt over its own keys and values, which are there as floats: [batch, tokens, heads,
    channels]."""
    tokens, group = query.shape[2], query.shape[1] // keys.shape[1]
    if group > 1:
        keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    mask = None
    device = query.device
    if any(padding) or 0 < sliding_window < tokens:
        position = torch.arange(tokens, device=device)
        behind = position[:, None] - position[None]
        seen = behind >= 0
        if sliding_window > 0:
            seen &= behind < sliding_window
        mask = seen[None]
        if any(padding):
            mask = mask & (position[None, None] >= torch.tensor(padding, device=device)[:, None, None])
        # A row of padding sees itself, so that it is a number; it becomes 0 below.
        mask = (mask | torch.eye(tokens, dtype=torch.bool, device=device))[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=mask is None,
                                                           scale=scale).transpose(1, 2).contiguous()
    for b, rows in enumerate(padding):
        if rows > 0:
            out[b, :rows] = 0
    return out


def _place(device: torch.device) -> str:
    return "the CPU" if device.type == "cpu" else f"'{device}'"


def _sinks_of(logits: torch.Tensor | None) -> Any:
    """As kvplane.Cache.attend() takes them: a list, or on a device a tensor there, so that nothing waits for it."""
    if logits is None:
        return None
    logits = logits.detach().float()
    return logits.contiguous() if logits.is_cuda else logits.tolist()


class CacheLayer(CacheLayerMixin):
    """One layer of a Cache."""

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, owner: "Cache", index: int, layer: Layer):
        super().__init__()
        self._owner, self._index, self._layer = owner, index, layer
        self.is_sliding = layer.sliding_window > 0
        self.forget()

    def __repr__(self) -> str:
        return f"CacheLayer({self._layer!r}, {self._owner.recipes[self._index]!r})"

    def forget(self) -> None:
        """Back to no tokens."""
        self.seen = 0                                  # columns of the attention mask, padding among them
        self.padding: list[int] = []                   # of each sequence, how many of these are padding
        self.pending: tuple[torch.Tensor, torch.Tensor] | None = None
        self.is_initialized = False

    @property
    def batch_size(self) -> int:
        if not self.padding:
            raise AttributeError("batch_size")         # as layers of transformers that have seen nothing
        return len(self.padding)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def _require_states(self, name: str, states: Any, heads: int, channels: int, keys: Any = None) -> None:
        """Raises Error (option, shape) for what is not (batch, heads, tokens, channels) where the cache is, of `keys`'
        batch, tokens and type where these are given."""
        # Sentences are made where they are needed: this is called for every layer and step.
        def refuse(code: str, sentence: str) -> None:
            _refuse(code, f"{name} of layer {self._index}: {sentence}")

        if not isinstance(states, torch.Tensor):
            refuse("option", f"{type(states).__name__}, expected a torch.Tensor")
        if states.device != self._owner.device:
            refuse("option", f"on device '{states.device}', expected {_place(self._owner.device)}, where the cache is; "
                             "a model that is spread over several devices is not served")
        if states.layout != torch.strided:
            refuse("option", f"of layout {states.layout}, expected torch.strided")
        if states.requires_grad:
            refuse("option", "with a gradient, which kvplane does not compute; expected a call under torch.no_grad()")
        if states.dtype not in _DTYPES:
            refuse("option", f"elements of {states.dtype}, expected float32, float16 or bfloat16")
        if states.dim() != 4 or states.shape[1] != heads or states.shape[3] != channels:
            refuse("shape", f"shape {tuple(states.shape)}, expected (batch, {heads}, tokens, {channels})")
        if keys is None:
            return
        if states.dtype != keys.dtype:
            refuse("option", f"{states.dtype}, expected {keys.dtype} as keys are")
        expected = (keys.shape[0], heads, keys.shape[2], channels)
        if tuple(states.shape) != expected:
            refuse("shape", f"shape {tuple(states.shape)}, expected {expected}: batch and tokens of the keys")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Hands keys and values on to the attention function. Raises Error (option, shape)."""
        self._owner.require_attention()
        self._owner.follow(key_states)
        self._require_states("keys", key_states, self._layer.kv_heads, self._layer.head_dim)
        self._require_states("values", value_states, self._layer.kv_heads, self._layer.value_head_dim, key_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.pending = key_states, value_states
        return _Handed.of(key_states, self), _Handed.of(value_states, self)

    def attend(self, query: torch.Tensor, mask: torch.Tensor | None, scale: float | None, softcap: float | None,
               sink_logits: torch.Tensor | None) -> torch.Tensor:
        """Stores what update() handed on, and attends: [batch, tokens, heads, channels]."""
        _require(self.pending is not None, "option",
                 f"attention of layer {self._index}: its keys are stored already; expected one call for each update()")
        keys, values = self.pending
        self._require_states("queries", query, self._layer.query_heads, self._layer.head_dim, keys)
        batch, _, tokens, _ = keys.shape
        cache = self._owner.kvplane_cache(batch)
        padding = self.padding or [0] * batch
        leading = padding if mask is None else self._owner.leading_padding(mask, batch, self.seen + tokens)
        for b, (old, new) in enumerate(zip(padding, leading)):
            _require(min(new, self.seen) == old, "option",
                     f"attention mask: {new} leading tokens of sequence {b} are masked, of which {old} were when they "
                     "came; expected a mask that goes on as it was")
        rows = [min(tokens, max(0, new - self.seen)) for new in leading]
        index, queries = self._index, query if cache.uses_queries(self._index) else None
        first = 0
        if self._owner.records_past:
            # The last tokens may be drafts, which must be taken back without a trace.
            first = tokens - MOST_DRAFTS if tokens > 2 * MOST_DRAFTS else 0
        parts = [(first, tokens, self._owner.records_past)]
        if first > 0:
            parts.insert(0, (0, first, False))
        stream, check = None, True
        if keys.is_cuda:
            stream = torch.cuda.current_stream(keys.device).cuda_stream
            check = self._owner.check or self.seen == 0
        for begin, end, provisional in parts:
            part = (keys, values, queries)
            if len(parts) > 1:
                part = [None if x is None else x[:, :, begin:end] for x in part]
            cache.append(*part, layer=index, provisional=provisional, check=check, stream=stream,
                         padding=[min(max(0, r - begin), end - begin) for r in rows] if any(rows) else None)
            # After each part: where the next one is refused, truncate() must know of this one.
            self.seen += end - begin
            self.padding = [min(new, self.seen) for new in leading]
        self.pending = None
        if self.seen == tokens > 1 and self._owner.exact_prompt and not softcap and sink_logits is None:
            return _exact_attention(query, keys, values, rows, scale, self._layer.sliding_window)
        out = query.new_empty(batch, tokens, query.shape[1], values.shape[-1])
        cache.attend(query, layer=index, out=out.transpose(1, 2), scale=scale or 0.0, softcap=softcap or 0.0,
                     sink_logits=_sinks_of(sink_logits), padding=rows if any(rows) else None,
                     read=self._owner.read, stream=stream)
        return out

    def get_seq_length(self) -> int:
        """Tokens that were seen, padding among them."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def _of_the_cache(self, *arguments) -> None:
        _refuse("option", f"layer {self._index} by itself, expected the method of the same name of the whole cache")

    reset = crop = reorder_cache = batch_repeat_interleave = batch_select_indices = _of_the_cache
    offload = prefetch = _of_the_cache


# The cache -----------------------------------------------------------------------------------------------------------

class Cache(_TransformersCache):
    """The KV cache of a model of transformers in few bits: give it to generate() or to the model as past_key_values.

    config: the model's, or the model. recipe: how layers are stored, one name for all or one for each, by default
    'standard'; kvplane.recipes() lists the names. policy: instead of a recipe, a kvplane.Policy or the path of one, as
    the engine's program `tune` writes it; name: the model's name, which the policy must be of (as the policy has it,
    unless it is given). threads: how many share the work, by default as many as torch has. read: a read policy, such
    as 'tolerance=0.01'; '': all bits. exact_prompt: the tokens of the first call attend to each other's keys and values
    as they come, which are there as floats then; otherwise to what is stored. device: 'cpu' or 'cuda:0' and so on; by
    default the model's, or where the first keys are. check: on a CUDA device, whether every call waits until the device
    has found that its keys and values can be stored; otherwise the first call of a sequence alone does, and later ones
    that cannot (NaN, infinity, beyond 32000) spoil the tokens around them.

    Raises kvplane.Error, a ValueError, whose sentence says what was found and what is supported.
    """

    def __init__(self, config: Any, recipe: str | Sequence[str] | None = None, *,
                 policy: Policy | str | os.PathLike | None = None, name: str | None = None, threads: int | None = None,
                 rotation_seed: int = 0, read: str = "", exact_prompt: bool = True, offloading: bool = False,
                 device: str | torch.device | None = None, check: bool = False):
        if device is None:
            device = "cpu"
            if isinstance(config, torch.nn.Module):
                device = getattr(config, "device", device)
                _require(torch.device(device).type in _DEVICES, "option",
                         f"model: on device '{device}', expected the CPU or a CUDA device")
        config = getattr(config, "config", config)
        _require(isinstance(config, transformers.PreTrainedConfig), "option",
                 f"config: {type(config).__name__}, expected a model of transformers or its config")
        _require(not offloading, "option",
                 "offloading: a kvplane cache is not offloaded; expected offloading=False (it is where the model is)")
        self._config = config.get_text_config(decoder=True)
        self.require_attention()
        self._layers = layers_of(config)
        self._options = dict(threads=torch.get_num_threads() if threads is None else threads,
                             rotation_seed=rotation_seed)
        if policy is None:
            _require(name is None, "option", f"name: '{name}' without a policy, which is of a model; expected policy=")
        else:
            if not isinstance(policy, Policy):
                _require(isinstance(policy, (str, os.PathLike)), "option",
                         f"policy: {type(policy).__name__}, expected a kvplane.Policy or the path of a file")
                policy = Policy.load(policy)
            # Heads of GGUF's llama models have their rotary pairs elsewhere than those of transformers.
            policy = policy.with_halves()
            self._options.update(policy=policy, model=policy.model if name is None else name)
        if recipe is not None:
            names = [recipe] if isinstance(recipe, str) else recipe
            _require(isinstance(names, (list, tuple)) and all(isinstance(r, str) for r in names), "option",
                     f"recipe: {recipe!r}, expected a name, or a list of one for each layer")
            self._options["recipe"] = list(names)
        self.read, self.exact_prompt, self.check = read, exact_prompt, check
        # Made at once, so that what cannot be is refused now; for more sequences it is made again.
        self._empty = True
        self._make(1, device)
        self.records_past = False
        self._masks: dict[int, tuple[torch.Tensor, list[int]]] = {}
        super().__init__(layers=[CacheLayer(self, i, layer) for i, layer in enumerate(self._layers)])

    def require_attention(self) -> None:
        """Raises Error (option) unless the model's attention implementation is kvplane's."""
        found = self._config._attn_implementation
        _require(found == ATTENTION, "option",
                 f"attention implementation '{found}', expected '{ATTENTION}': "
                 f"model.set_attn_implementation('{ATTENTION}'), or attn_implementation='{ATTENTION}' in "
                 "from_pretrained()")

    def _make(self, batch: int, device: str | torch.device) -> None:
        made = _Cache(self._layers, batch=batch, device=str(device), **self._options)
        layer = self._layers[0]
        if batch == 1:  # a read policy that cannot be is refused before there are tokens
            made.attend(torch.empty(1, layer.query_heads, 0, layer.head_dim, device=made.device), read=self.read)
        self._cache, self.device = made, torch.device(made.device)

    def follow(self, keys: Any) -> None:
        """Goes to the device of the first keys. Raises Error (option) for one that kvplane does not serve, or that this
        build does not."""
        if self._empty and isinstance(keys, torch.Tensor) and keys.device != self.device:
            _require(keys.device.type in _DEVICES, "option",
                     f"keys: on device '{keys.device}', expected the CPU or a CUDA device")
            self._make(self._cache.batch, keys.device)

    def kvplane_cache(self, batch: int) -> _Cache:
        """The kvplane.Cache of so many sequences; what it holds stays. Raises Error (shape) for another batch than its
        tokens are of."""
        if self._empty:
            if self._cache.batch != batch:
                self._make(batch, self.device)
            self._empty = False
        _require(self._cache.batch == batch, "shape",
                 f"a batch of {batch}, but the cache holds {self._cache.batch} sequences")
        return self._cache

    def leading_padding(self, mask: torch.Tensor, batch: int, columns: int) -> list[int]:
        """Of each sequence how many of its first tokens are padding. Raises Error for other masks."""
        known = self._masks.get(id(mask))
        if known is not None and known[0] is mask:
            return known[1]
        _require(mask.dim() == 2, "option",
                 f"attention mask of shape {tuple(mask.shape)}, expected (batch, tokens): kvplane's attention is "
                 "causal, with left padding and sliding windows")
        _require(tuple(mask.shape) == (batch, columns), "shape",
                 f"attention mask of shape {tuple(mask.shape)}, expected {(batch, columns)}: one column for each token "
                 "that was seen or comes")
        taken = mask.cpu().bool()
        leading = columns - taken.sum(dim=1)
        wrong = (torch.arange(columns)[None] >= leading[:, None]) != taken
        if wrong.any():
            b, column = (int(i) for i in wrong.nonzero()[0])
            _refuse("option", f"attention mask: sequence {b} is not masked from the left alone, but at column {column} "
                              "too; expected left padding")
        if len(self._masks) > 3:
            self._masks.clear()
        self._masks[id(mask)] = mask, leading.tolist()
        return self._masks[id(mask)][1]

    # What transformers calls ---------------------------------------------------------------------------------------

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Hands keys and values of a layer on to the attention function. Raises Error (index, option, shape)."""
        _require(0 <= layer_idx < len(self.layers), "index",
                 f"layer {layer_idx} of {len(self.layers)}: expected the model whose config the cache was made for")
        if layer_idx == 0:
            seen = [layer.seen for layer in self.layers]
            other = next((i for i, tokens in enumerate(seen) if tokens != seen[0]), 0)
            _require(other == 0, "option",
                     f"layer 0 holds {seen[0]} tokens, layer {other} {seen[other]}: a call failed between them, or was "
                     f"of a model of fewer layers than {len(seen)}; expected truncate({min(seen)}) first")
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)

    def reset(self) -> None:
        self._cache.clear()
        self._empty = True
        self.records_past = False
        for layer in self.layers:
            layer.forget()

    def activate_past_recording(self) -> None:
        """Tokens from now on may be drafts: they are kept apart until crop() says which of them stay."""
        self.records_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last -tokens_to_remove tokens back; those before them are drafts no more. Raises Error (index)."""
        seen = self.get_seq_length()
        _require(_is_whole(tokens_to_remove) and -seen <= tokens_to_remove <= 0, "index",
                 f"crop: {tokens_to_remove} with {seen} tokens, expected a negative number: how many to take back, at "
                 f"most {-seen}")
        self.truncate(seen + int(tokens_to_remove))

    def truncate(self, tokens: int) -> None:
        """Forgets all but the first tokens, counted as get_seq_length() does, in whatever layers have more: also those
        of a call that failed in some layer. Raises Error (index)."""
        longest = max(self.layers, key=lambda layer: layer.seen)
        _require(_is_whole(tokens) and 0 <= tokens <= longest.seen, "index",
                 f"truncate: to {tokens} of {longest.seen} tokens")
        if longest.seen > 0:
            self._cache.truncate([max(0, tokens - p) for p in longest.padding])
            self._cache.accept()
        for layer in self.layers:
            layer.pending = None
            layer.seen = min(layer.seen, tokens)
            layer.padding = [min(p, layer.seen) for p in layer.padding]

    def _reorder(self, name: str, indices: Any) -> None:
        found = torch.as_tensor(indices)
        batch = self._cache.batch
        _require(not found.is_floating_point() and found.dim() == 1, "option",
                 f"{name}: {found.dtype} of shape {tuple(found.shape)}, expected a list of numbers of sequences")
        if found.dtype == torch.bool:
            _require(found.numel() == batch, "shape",
                     f"{name}: {found.numel()} flags, expected {batch}, one for each sequence")
            found = found.nonzero()[:, 0]
        numbers = found.tolist()
        for index in numbers:
            _require(0 <= index < batch, "index", f"{name}: sequence {index} of {batch}, expected 0 to {batch - 1}")
        _require(len(numbers) > 0, "shape", f"{name}: no sequences, expected at least 1")
        self._cache.reorder(numbers)
        for layer in self.layers:
            if layer.padding:
                layer.padding = [layer.padding[i] for i in numbers]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Sequence i becomes a fork of sequence beam_idx[i]. Raises Error (index) for one that is not there."""
        if not self._empty:
            self._reorder("reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Of each sequence that many, side by side. Raises Error (option)."""
        _require(_is_whole(repeats) and repeats >= 1, "option",
                 f"batch_repeat_interleave: {repeats} times, expected at least 1")
        if not self._empty:
            self._reorder("batch_repeat_interleave", [i for i in range(self._cache.batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these sequences: their numbers, or a flag for each. Raises Error (index, shape, option)."""
        if not self._empty:
            self._reorder("batch_select_indices", indices)

    # What kvplane's cache has beside it ----------------------------------------------------------------------------

    @property
    def recipes(self) -> list[str]:
        """The recipe of each layer."""
        return self._cache.recipes

    @property
    def bytes(self) -> int:
        """Memory of all keys and values; what sequences share is counted once."""
        return self._cache.bytes

    @property
    def bits_per_element(self) -> float:
        """8 * bytes / numbers stored; a layer with a sliding window counts as its window's tokens."""
        return self._cache.bits_per_element

    def fork(self) -> "Cache":
        """A cache of the same content, which shares its pages."""
        other = object.__new__(Cache)
        other.__dict__.update(self.__dict__)
        other._cache, other._masks = self._cache.fork(), {}
        other.layers = [CacheLayer(other, i, layer) for i, layer in enumerate(self._layers)]
        for mine, copy in zip(self.layers, other.layers):
            copy.seen, copy.padding, copy.is_initialized = mine.seen, list(mine.padding), mine.is_initialized
        return other

    def __deepcopy__(self, memo: dict) -> "Cache":
        return self.fork()

    def save(self, path: str | os.PathLike, *, compress: bool = False) -> None:
        """Writes all layers and sequences to a safetensors file. Raises Error (io, option)."""
        self._cache.accept()
        self._cache.save(os.fspath(path), compress=compress)

    @classmethod
    def load(cls, path: str | os.PathLike, config: Any, *arguments, **options) -> "Cache":
        """What save() wrote, of a cache that was made with the same arguments. Raises Error (io, format, mismatch)."""
        cache = cls(config, *arguments, **options)
        cache._cache.load(os.fspath(path))
        cache._empty = False
        for index, layer in enumerate(cache.layers):
            tokens = cache._cache.tokens(index)
            layer.seen = max(tokens)
            layer.padding = [layer.seen - t for t in tokens]
            layer.is_initialized = True
        return cache


# What is registered --------------------------------------------------------------------------------------------------

def _attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               attention_mask: torch.Tensor | None, scaling: float | None = None, dropout: float = 0.0,
               sliding_window: Any = _NOT_GIVEN, softcap: float | None = None, s_aux: torch.Tensor | None = None,
               is_causal: bool | None = None, position_bias: torch.Tensor | None = None, **kwargs):
    layer = getattr(key, "kvplane_layer", None)
    _require(layer is not None, "option",
             f"attention implementation '{ATTENTION}': keys that come from no kvplane.transformers.Cache; expected "
             "past_key_values=kvplane.transformers.Cache(model.config)")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    for found, what in ((not is_causal, "attention that is not causal"), (dropout != 0.0, f"a dropout of {dropout}"),
                        (position_bias is not None, "a position bias"),
                        (kwargs.get("output_attentions"), "attention weights as an output"),
                        (kwargs.get("head_mask") is not None, "a mask of heads")):
        _require(not found, "option", f"attention implementation '{ATTENTION}': {what}, which it does not have")
    if sliding_window is not _NOT_GIVEN:
        _require((sliding_window or 0) == layer._layer.sliding_window, "option",
                 f"layer {layer._index}: a sliding window of {sliding_window}, expected {layer._layer.sliding_window} "
                 "as in the model's config (0: none)")
    return layer.attend(query, attention_mask, scaling, softcap, s_aux), None


def _mask(batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0,
          mask_function: Any = None, attention_mask: torch.Tensor | None = None, allow_is_causal_skip: bool = True,
          **kwargs) -> torch.Tensor | None:
    """The mask as it was given (batch, tokens), or None where nothing is padding."""
    _require(allow_is_causal_skip and "allow_is_bidirectional_skip" not in kwargs, "option",
             f"attention implementation '{ATTENTION}': a mask beyond causal ones with left padding and sliding windows "
             "(several sequences in one row, blocks that see each other, or functions of the model's own)")
    if attention_mask is None:
        return None
    _require(attention_mask.shape[-1] == kv_length, "shape",
             f"attention mask of {attention_mask.shape[-1]} columns, expected {kv_length}: one for each token that was "
             "seen or comes")
    # To the CPU at once, where the rest is asked: the one time that a step waits for a device.
    attention_mask = attention_mask.cpu()
    return None if attention_mask.all() else attention_mask


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)
