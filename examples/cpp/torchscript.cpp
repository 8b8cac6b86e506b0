// torchscript DIR COUNT TOKEN TOKEN ...: continue a prompt with what `linearize export --format torchscript` wrote.
//
//   g++ -std=c++20 -O1 torchscript.cpp -o torchscript -I$TORCH/include -I$TORCH/include/torch/csrc/api/include \
//       -L$TORCH/lib -Wl,-rpath,$TORCH/lib -ltorch -ltorch_cpu -lc10          with TORCH the folder of the torch wheel

#include <ATen/Parallel.h>
#include <torch/script.h>

#include <cstdio>
#include <string>
#include <vector>

int main(int count, char** words) {
  if (count < 4) {
    std::fprintf(stderr, "usage: %s DIR COUNT TOKEN TOKEN ...\n", words[0]);
    return 2;
  }
  torch::InferenceMode guard;
  at::set_num_threads(1);
  const std::string directory = words[1];
  auto step = torch::jit::load(directory + "/step.pt"), piece = torch::jit::load(directory + "/piece.pt");
  auto start = torch::jit::load(directory + "/states.pt");
  const int64_t length = start.attr("piece").toInt();
  const bool positions = start.attr("positions").toBool();
  std::vector<torch::Tensor> states;
  for (const auto& value : start.get_method("forward")({}).toTensorVector()) states.push_back(value.clone());
  int64_t seen = 0;

  auto feed = [&](torch::jit::Module& program, const std::vector<int64_t>& ids) {
    const auto tokens = torch::tensor(ids, torch::kInt64).unsqueeze(0);
    std::vector<torch::jit::IValue> inputs = {tokens, torch::ones_like(tokens)};
    if (positions) inputs.push_back(torch::arange(seen, seen + tokens.size(1)).unsqueeze(0));
    inputs.insert(inputs.end(), states.begin(), states.end());
    const auto results = program.forward(inputs).toTuple()->elements();
    for (size_t i = 0; i < states.size(); ++i) states[i] = results[i + 1].toTensor();
    seen += tokens.size(1);
    return results[0].toTensor().select(1, -1).argmax(-1).item<int64_t>();
  };

  std::vector<int64_t> prompt;
  for (int i = 3; i < count; ++i) prompt.push_back(std::atoll(words[i]));
  int64_t next = 0;
  size_t at = 0;
  for (; at + length <= prompt.size(); at += length)
    next = feed(piece, {prompt.begin() + at, prompt.begin() + at + length});
  for (; at < prompt.size(); ++at) next = feed(step, {prompt[at]});
  for (int left = std::atoi(words[2]); left > 0; --left) {
    std::printf("%lld\n", static_cast<long long>(next));
    if (left > 1) next = feed(step, {next});
  }
}
