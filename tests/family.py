"Models of the family as their authors publish them, but tiny and with random weights: the real configs, made narrow."
import json
import pickle
from pathlib import Path

import numpy as np
import torch
from conftest import partners
from transformers import BertConfig, BertForMaskedLM

FAMILY = Path(__file__).resolve().parents[2]/"shared"/"family"   # real dictionaries, cells and configs, where they are
SMALL = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, context=None)
PLAIN = dict(architectures=["BertForMaskedLM"], hidden_act="relu", initializer_range=.02, layer_norm_eps=1e-12,
             model_type="bert", pad_token_id=0, type_vocab_size=2, hidden_dropout_prob=.02,
             attention_probs_dropout_prob=.02)
KINDS = dict(V1=(["human"], ["<pad>", "<mask>"], 2048, "relu"),
             V2=(["human"], ["<pad>", "<mask>", "<cls>", "<eos>"], 4096, "relu"),
             Mouse=(["mouse"], ["<pad>", "<mask>"], 2048, "relu"),
             Mix=(["human", "mouse"], ["<pad>", "<mask>"], 2048, "silu"))


def net_of(config, n_tokens=None, **more):
    "A BERT of a config, narrow, whose weights all matter"
    narrow = {**config, **{k: v for k, v in SMALL.items() if v}, **more}
    if n_tokens: narrow["vocab_size"] = n_tokens
    torch.manual_seed(0)
    net = BertForMaskedLM(BertConfig(**narrow))
    for name, p in net.named_parameters():
        torch.nn.init.normal_(p, std=.3, mean=1. if "LayerNorm.weight" in name else 0.)
    return net.eval()


def folder_of(kind, folder, ids=40, weights="model.safetensors", beside="geneformer", **more):
    "A model's folder, with its dictionaries in a folder `geneformer` beside it (or in its own: beside='')"
    species, specials, context, act = KINDS[kind]
    of_species = dict(zip(("human", "mouse"), partners(ids)))   # those of `toy`
    genes = [g for s in species for g in of_species[s]]
    tokens = {name: np.int16(i) if i > 1 else i for i, name in enumerate([*specials, *genes, "ENSGR0000002586"])}
    net = net_of({**PLAIN, "hidden_act": act, "max_position_embeddings": context}, len(tokens), **more)
    net.save_pretrained(folder)
    if weights == "pytorch_model.bin":
        torch.save(net.state_dict(), folder/"pytorch_model.bin")
        (folder/"model.safetensors").unlink()
    place = folder.parent/beside if beside else folder
    place.mkdir(exist_ok=True)
    medians = {g: np.float64(1+i % 3) for i, g in enumerate(genes)}
    found = dict(token_dictionary=tokens, gene_median_dictionary=medians)
    if kind == "V2": found["ensembl_mapping_dict"] = {"ENSG00000999999": genes[0], **{g: g for g in genes}}
    for name, entries in found.items(): (place/f"{name}_{kind}.pkl").write_bytes(pickle.dumps(entries))
    return folder


def config_of(name): return json.loads((FAMILY/f"{name}.config.json").read_text())
