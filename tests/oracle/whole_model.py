"""The MTP head of Qwen3.5, which transformers does not read, wired on transformers' own decoder layer."""

import copy
import pathlib

import torch
from reference_models import PlainMixture
from safetensors import safe_open


def stored_tensors(folder: pathlib.Path, prefix: str) -> dict:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():
                if name.startswith(prefix):
                    tensors[name.removeprefix(prefix)] = stored.get_tensor(name)
    return tensors


class MtpHead(torch.nn.Module):
    """Predicts token i + 2 from the body's normed hidden state of token i and the embedding of token i + 1."""

    def __init__(self, model, folder: pathlib.Path):
        super().__init__()
        body = model.model.language_model
        config = body.config
        full = config.layer_types.index("full_attention")
        # The body's mixtures may have been unpacked, so the layer is made anew.
        layer = type(body.layers[full])(config, full).to(torch.float32).eval()
        self.layers = torch.nn.ModuleList([layer])
        hidden = config.hidden_size
        self.fc = torch.nn.Linear(2 * hidden, hidden, bias=False)
        self.norm = copy.deepcopy(body.norm)
        self.pre_fc_norm_embedding = copy.deepcopy(body.norm)
        self.pre_fc_norm_hidden = copy.deepcopy(body.norm)
        weights = {name: tensor.float() for name, tensor in stored_tensors(folder, "mtp.").items()}
        self.load_state_dict(weights)
        mixture = getattr(layer.mlp, "experts", None)
        if mixture is not None:
            layer.mlp = PlainMixture(layer.mlp, config.num_experts_per_tok, True)
        # Not modules of this one: the head shares them with the body.
        object.__setattr__(self, "rotary", body.rotary_emb)
        object.__setattr__(self, "head", model.lm_head)

    def forward(self, embedded: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """embedded, normed [1, T, hidden] -> logits [1, T - 1, vocabulary]."""
        e = self.pre_fc_norm_embedding(embedded[:, 1:])
        d = self.pre_fc_norm_hidden(normed[:, :-1])
        x = self.fc(torch.cat([e, d], -1))
        slots = x.shape[1]
        positions = torch.arange(slots)[None]
        mask = torch.full((slots, slots), torch.finfo(x.dtype).min).triu(1)[None, None]
        x = self.layers[0](x, position_embeddings=self.rotary(x, positions), attention_mask=mask)
        x = x[0] if isinstance(x, tuple) else x
        return self.head(self.norm(x))
