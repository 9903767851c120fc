"""llama.cpp as the wheel xllamacpp carries it: raw logits through its C functions, answers through its server.

The C structs of parameters are passed by value and grow from version to version. They are taken here as blocks of
bytes that are larger than any version's (every 64-bit calling convention passes such a struct through memory), filled
by the library's own defaults, and only fields of which the default value is recognised at its place are changed.
"""

import ctypes
import os
import re
from functools import cache

import numpy as np
import pytest

_SIZE = 512
_F32, _OFF = 0, 0
_THREADS = 1  # more wait for each other by spinning, which is slow where other tests run beside


class _Params(ctypes.Structure):
    _fields_ = [("data", ctypes.c_uint8 * _SIZE)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # a failed assertion would start a debugger


@cache
def _library():
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp (xllamacpp) is not installed")
    lib = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    pointer, params = ctypes.c_void_p, _Params
    for name, result, arguments in (
        ("llama_backend_init", None, []),
        ("llama_model_default_params", params, []),
        ("llama_context_default_params", params, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, params]),
        ("llama_init_from_model", pointer, [pointer, params]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", ctypes.c_int32, [pointer]),
        ("llama_batch_init", _Batch, [ctypes.c_int32] * 3),
        ("llama_batch_free", None, [_Batch]),
        ("llama_decode", ctypes.c_int32, [pointer, _Batch]),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, ctypes.c_int32]),
        ("llama_adapter_lora_init", pointer, [pointer, ctypes.c_char_p]),
        ("llama_set_adapters_lora", ctypes.c_int32, [pointer, ctypes.POINTER(pointer), ctypes.c_size_t,
                                                     ctypes.POINTER(ctypes.c_float)]),
        ("llama_tokenize", ctypes.c_int32, [pointer, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32),
                                            ctypes.c_int32, ctypes.c_bool, ctypes.c_bool]),
        ("llama_free", None, [pointer]),
        ("llama_model_free", None, [pointer]),
        ("llama_log_set", None, [pointer, pointer]),
    ):  # fmt: skip
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.llama_backend_init()
    return lib


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class Model:
    """A GGUF file in llama.cpp, with LoRA files on it; keys and values in float32, no flash attention.

    model = Model("x.gguf", lora=["l.gguf"]); model.logits(ids) -> float32 [len(ids), vocabulary]
    """

    def __init__(self, path, lora=(), context=512):
        self.lib, self.said = _library(), []
        self._log = _LOG(lambda level, text, _: self.said.append(text.decode(errors="replace")))
        self.lib.llama_log_set(ctypes.cast(self._log, ctypes.c_void_p), None)
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        assert self.model, "".join(self.said)[-2000:]
        self.vocab = self.lib.llama_model_get_vocab(self.model)
        self.size = self.lib.llama_vocab_n_tokens(self.vocab)
        self.adapters = [self.lib.llama_adapter_lora_init(self.model, str(file).encode()) for file in lora]
        assert all(self.adapters), "".join(self.said)[-2000:]
        self.context = context

    def _context(self):
        params = self.lib.llama_context_default_params()
        words = (ctypes.c_int32 * (_SIZE // 4)).from_buffer(params)
        assert list(words[:3]) == [512, 2048, 512], f"unknown layout: {list(words[:32])}"
        words[0] = words[1] = words[2] = self.context
        assert 0 < words[7] == words[8] < 1024, f"unknown layout: {list(words[:32])}"
        words[7] = words[8] = _THREADS
        flash = next(i for i in range(9, 16) if list(words[i - 3 : i + 1]) == [-1, -1, -1, -1])
        words[flash] = _OFF
        kinds = next(i for i in range(flash + 8, flash + 24) if list(words[i : i + 2]) == [1, 1])  # float16 both
        words[kinds] = words[kinds + 1] = _F32
        context = self.lib.llama_init_from_model(self.model, params)
        assert context, "".join(self.said)[-2000:]
        return context

    def logits(self, ids):
        context, n = self._context(), len(ids)
        if self.adapters:
            pointers = (ctypes.c_void_p * len(self.adapters))(*self.adapters)
            scales = (ctypes.c_float * len(self.adapters))(*[1.0] * len(self.adapters))
            assert self.lib.llama_set_adapters_lora(context, pointers, len(self.adapters), scales) == 0
        batch = self.lib.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), i, 1, 1
            batch.seq_id[i][0] = 0
        assert self.lib.llama_decode(context, batch) == 0, "".join(self.said)[-2000:]
        rows = [np.ctypeslib.as_array(self.lib.llama_get_logits_ith(context, i), (self.size,)).copy() for i in range(n)]
        self.lib.llama_batch_free(batch)
        self.lib.llama_free(context)
        return np.stack(rows)

    def ids(self, text, special=True):
        data = text.encode()
        out = (ctypes.c_int32 * (len(data) + 8))()
        n = self.lib.llama_tokenize(self.vocab, data, len(data), out, len(out), False, special)
        assert n >= 0
        return list(out[:n])

    def settings(self):
        """What the library said about cache types and attention as it made contexts."""
        return re.findall(r"(?:K|V) \((\w+)\)", "".join(self.said))

    def close(self):
        self.lib.llama_model_free(self.model)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Server:
    """llama.cpp's server in this process: the door of llama-server, without the socket.

    server = Server("x.gguf", template=jinja text or None, lora="l.gguf", mmproj="m.gguf")
    server.chat(messages) -> its JSON answer
    """

    def __init__(self, path, template=None, lora=None, mmproj=None, context=1024, image_tokens=None):
        x = pytest.importorskip("xllamacpp", reason="llama.cpp (xllamacpp) is not installed")
        params = x.CommonParams()
        params.model.path = str(path)
        params.n_ctx = params.n_batch = params.n_ubatch = context
        params.n_parallel, params.warmup, params.use_jinja, params.cache_prompt = 1, False, True, False
        params.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = x.ggml_type.GGML_TYPE_F32
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = _THREADS
        params.port = 0
        params.sampling.temp = 0.0
        if template:
            params.chat_template = template
        if lora:
            params.lora_adapters = [x.CommonAdapterLoraInfo(path=str(lora), scale=1.0)]
        if mmproj:
            params.mmproj.path = str(mmproj)
        if image_tokens:
            params.image_min_tokens, params.image_max_tokens = image_tokens
        self.server = x.Server(params)

    def chat(self, messages, max_tokens=32, **more):
        request = {
            "messages": messages, "max_tokens": max_tokens, "temperature": 0.0, "return_tokens": True, "verbose": True,
            **more,
        }  # fmt: skip
        answer = self.server.handle_chat_completions(request)
        assert "choices" in answer, answer
        return answer
