// generate DIR COUNT TOKEN TOKEN ...: continue a prompt of token ids with an exported directory, one id a line.
//
//   ln -s .../site-packages/onnxruntime/capi/libonnxruntime.so.1.* libonnxruntime.so.1     (the name the wheel leaves out)
//   g++ -std=c++17 -O2 generate.cpp -o generate libonnxruntime.so.1 -Wl,-rpath,$PWD
//
// Which output feeds which input is the order of the file's own lists: after the token inputs come the states, and after
// the logits come the same states one step later (linearize.json says the same by name).

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "onnxruntime_abi.h"

namespace {

const void* const* api;

void check(OrtStatus* status) {
  if (!status) return;
  auto message = reinterpret_cast<const char* (*)(const OrtStatus*)>(const_cast<void*>(api[ort::GET_ERROR_MESSAGE]));
  std::fprintf(stderr, "onnxruntime: %s\n", message(status));
  std::exit(1);
}

// Calls the function at a place of the table, and leaves with its message if it fails.
template <typename... Arguments>
void call(ort::Place place, Arguments... arguments) {
  check(reinterpret_cast<OrtStatus* (*)(Arguments...)>(const_cast<void*>(api[place]))(arguments...));
}

void release(OrtValue* value) {
  reinterpret_cast<void (*)(OrtValue*)>(const_cast<void*>(api[ort::RELEASE_VALUE]))(value);
}

OrtAllocator* allocator() {
  OrtAllocator* found = nullptr;
  call(ort::GET_ALLOCATOR_WITH_DEFAULT_OPTIONS, &found);
  return found;
}

OrtValue* tensor(const std::vector<int64_t>& shape, int type) {
  OrtValue* value = nullptr;
  call(ort::CREATE_TENSOR_AS_ORT_VALUE, allocator(), shape.data(), shape.size(), type, &value);
  return value;
}

template <typename T>
T* data(OrtValue* value) {
  void* found = nullptr;
  call(ort::GET_TENSOR_MUTABLE_DATA, value, &found);
  return static_cast<T*>(found);
}

size_t width(int type) { return type == ort::FLOAT ? 4 : type == ort::INT64 ? 8 : 1; }

class Model {
 public:
  explicit Model(const std::string& directory) {
    OrtEnv* env = nullptr;
    OrtSessionOptions* options = nullptr;
    call(ort::CREATE_ENV, 3, "linearize", &env);
    call(ort::CREATE_SESSION_OPTIONS, &options);
    call(ort::SET_INTRA_OP_NUM_THREADS, options, 1);
    call(ort::CREATE_SESSION, static_cast<const OrtEnv*>(env), (directory + "/model.onnx").c_str(),
         static_cast<const OrtSessionOptions*>(options), &session_);
    inputs_ = names(ort::SESSION_GET_INPUT_COUNT, ort::SESSION_GET_INPUT_NAME);
    outputs_ = names(ort::SESSION_GET_OUTPUT_COUNT, ort::SESSION_GET_OUTPUT_NAME);
    tokens_ = inputs_.size() - (outputs_.size() - 1);
    for (size_t i = tokens_; i < inputs_.size(); ++i) states_.push_back(zeros(i));
  }

  // Feeds tokens, keeps the new state, and returns the most likely next token.
  int64_t step(const std::vector<int64_t>& ids) {
    const std::vector<int64_t> shape = {1, static_cast<int64_t>(ids.size())};
    std::vector<OrtValue*> values;
    for (size_t i = 0; i < tokens_; ++i) {
      OrtValue* value = tensor(shape, ort::INT64);
      const std::string name = inputs_[i];
      for (size_t t = 0; t < ids.size(); ++t)
        data<int64_t>(value)[t] = name == "input_ids" ? ids[t] : name == "attention_mask" ? 1 : seen_ + t;
      values.push_back(value);
    }
    values.insert(values.end(), states_.begin(), states_.end());
    std::vector<OrtValue*> results(outputs_.size(), nullptr);
    call(ort::RUN, session_, static_cast<const OrtRunOptions*>(nullptr), inputs_.data(),
         static_cast<const OrtValue* const*>(values.data()), values.size(), outputs_.data(), outputs_.size(),
         results.data());
    for (OrtValue* value : values) release(value);
    states_.assign(results.begin() + 1, results.end());
    seen_ += ids.size();
    const int64_t next = most_likely(results[0], ids.size());
    release(results[0]);
    return next;
  }

 private:
  std::vector<const char*> names(ort::Place count_place, ort::Place name_place) {
    size_t count = 0;
    call(count_place, static_cast<const OrtSession*>(session_), &count);
    std::vector<const char*> found(count);
    for (size_t i = 0; i < count; ++i) {
      char* name = nullptr;
      call(name_place, static_cast<const OrtSession*>(session_), i, allocator(), &name);
      found[i] = name;
    }
    return found;
  }

  // The state before the first token: dims without a size are the batch (first), or the tokens so far.
  OrtValue* zeros(size_t input) {
    OrtTypeInfo* info = nullptr;
    const OrtTensorTypeAndShapeInfo* shape = nullptr;
    int type = 0;
    size_t rank = 0, count = 1;
    call(ort::SESSION_GET_INPUT_TYPE_INFO, static_cast<const OrtSession*>(session_), input, &info);
    call(ort::CAST_TYPE_INFO_TO_TENSOR_INFO, static_cast<const OrtTypeInfo*>(info), &shape);
    call(ort::GET_TENSOR_ELEMENT_TYPE, shape, &type);
    call(ort::GET_DIMENSIONS_COUNT, shape, &rank);
    std::vector<int64_t> dims(rank);
    if (rank) call(ort::GET_DIMENSIONS, shape, dims.data(), rank);
    for (size_t i = 0; i < rank; ++i) {
      if (dims[i] < 0) dims[i] = i == 0 ? 1 : 0;
      count *= dims[i];
    }
    OrtValue* value = tensor(dims, type);
    if (count) std::memset(data<char>(value), 0, count * width(type));
    return value;
  }

  static int64_t most_likely(OrtValue* logits, size_t length) {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    size_t count = 0;
    call(ort::GET_TENSOR_TYPE_AND_SHAPE, static_cast<const OrtValue*>(logits), &info);
    call(ort::GET_TENSOR_SHAPE_ELEMENT_COUNT, static_cast<const OrtTensorTypeAndShapeInfo*>(info), &count);
    const size_t vocabulary = count / length;
    const float* last = data<float>(logits) + (length - 1) * vocabulary;
    size_t best = 0;
    for (size_t i = 1; i < vocabulary; ++i)
      if (last[i] > last[best]) best = i;
    return static_cast<int64_t>(best);
  }

  OrtSession* session_ = nullptr;
  std::vector<const char*> inputs_, outputs_;
  std::vector<OrtValue*> states_;
  size_t tokens_ = 0;
  int64_t seen_ = 0;
};

}  // namespace

int main(int count, char** words) {
  if (count < 4) {
    std::fprintf(stderr, "usage: %s DIR COUNT TOKEN TOKEN ...\n", words[0]);
    return 2;
  }
  api = OrtGetApiBase()->GetApi(ort::VERSION);
  if (!api) {
    std::fprintf(stderr, "this onnxruntime (%s) is too old\n", OrtGetApiBase()->GetVersionString());
    return 1;
  }
  Model model(words[1]);
  std::vector<int64_t> prompt;
  for (int i = 3; i < count; ++i) prompt.push_back(std::atoll(words[i]));
  const size_t piece = 128;
  int64_t next = 0;
  for (size_t start = 0; start < prompt.size(); start += piece) {
    const size_t stop = std::min(start + piece, prompt.size());
    next = model.step({prompt.begin() + start, prompt.begin() + stop});
  }
  for (int left = std::atoi(words[2]); left > 0; --left) {
    std::printf("%lld\n", static_cast<long long>(next));
    if (left > 1) next = model.step({next});
  }
}
