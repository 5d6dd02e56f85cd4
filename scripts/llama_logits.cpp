// Writes llama.cpp's float32 logits for the token windows of `route_fidelity.py --export`, to be scored by
// `route_fidelity.py --logits`. It feeds token ids, so neither tokeniser nor BOS can differ from the reference.
//
//   g++ -O2 -std=c++17 llama_logits.cpp -I$LLAMA/include -I$LLAMA/ggml/include -L$LIB -lllama -lggml -lggml-base
//       -Wl,-rpath,$LIB -o llama_logits
//   llama_logits MODEL.gguf tokens.i32 OUT.f32 TOKENS_PER_CALL FLASH(0|1) KV(f16|f32|bf16|q8_0) [WINDOWS]
//
// TOKENS_PER_CALL 512 is the prompt's path, 1 is decoding.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "llama.h"

static void require(bool ok, const char *what) {
    if (!ok) {
        std::fprintf(stderr, "llama_logits: %s\n", what);
        std::exit(1);
    }
}

int main(int argc, char **argv) {
    require(argc >= 7, "usage: MODEL TOKENS OUT TOKENS_PER_CALL FLASH KV [WINDOWS]");
    const int window_tokens = 512, per_call = std::atoi(argv[4]);
    require(per_call >= 1 && per_call <= window_tokens, "TOKENS_PER_CALL must be 1..512");
    std::vector<llama_token> tokens;
    std::FILE *in = std::fopen(argv[2], "rb");
    require(in, "cannot open the token file");
    for (llama_token t; std::fread(&t, sizeof t, 1, in) == 1;) tokens.push_back(t);
    std::fclose(in);
    size_t num_windows = tokens.size() / window_tokens;
    if (argc > 7) num_windows = std::min(num_windows, size_t(std::atoi(argv[7])));

    llama_backend_init();
    llama_model_params model_params = llama_model_default_params();
    llama_model *model = llama_model_load_from_file(argv[1], model_params);
    require(model, "cannot load the model");
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = window_tokens;
    params.n_threads = params.n_threads_batch = 2;
    params.flash_attn_type = std::atoi(argv[5]) ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    const std::string kv = argv[6];
    params.type_k = params.type_v = kv == "f32"    ? GGML_TYPE_F32
                                    : kv == "bf16" ? GGML_TYPE_BF16
                                    : kv == "q8_0" ? GGML_TYPE_Q8_0
                                                   : GGML_TYPE_F16;
    llama_context *context = llama_init_from_model(model, params);
    require(context, "cannot make a context");
    std::fprintf(stderr, "%s\n", llama_print_system_info());
    const size_t vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));

    std::FILE *out = std::fopen(argv[3], "wb");
    require(out, "cannot open the output file");
    llama_batch batch = llama_batch_init(window_tokens, 0, 1);
    for (size_t w = 0; w < num_windows; ++w) {
        llama_memory_clear(llama_get_memory(context), true);
        for (int start = 0; start < window_tokens; start += per_call) {
            batch.n_tokens = std::min(per_call, window_tokens - start);
            for (int i = 0; i < batch.n_tokens; ++i) {
                batch.token[i] = tokens[w * window_tokens + start + i];
                batch.pos[i] = start + i;
                batch.n_seq_id[i] = 1;
                batch.seq_id[i][0] = 0;
                batch.logits[i] = 1;
            }
            require(llama_decode(context, batch) == 0, "llama_decode failed");
            for (int i = 0; i < batch.n_tokens; ++i)
                require(std::fwrite(llama_get_logits_ith(context, i), 4 * vocabulary, 1, out) == 1, "disk full?");
        }
    }
    require(std::fclose(out) == 0, "disk full?");
    llama_batch_free(batch);
    llama_free(context);
    llama_model_free(model);
}
