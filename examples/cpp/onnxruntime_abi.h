// The few functions of onnxruntime's C interface that generate.cpp calls, for machines that have the shared library
// (it lies in every onnxruntime wheel) but not the header. The interface is a table of function pointers that only ever
// grows at its end, so a function's place is fixed for good.
#pragma once
#include <cstddef>
#include <cstdint>

extern "C" {
struct OrtStatus;
struct OrtEnv;
struct OrtSession;
struct OrtSessionOptions;
struct OrtRunOptions;
struct OrtValue;
struct OrtMemoryInfo;
struct OrtAllocator;
struct OrtTypeInfo;
struct OrtTensorTypeAndShapeInfo;
struct OrtApiBase {
  const void* const* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};
const OrtApiBase* OrtGetApiBase();
}

namespace ort {

enum Type { FLOAT = 1, INT64 = 7, BOOL = 9 };
enum Place {
  GET_ERROR_MESSAGE = 2, CREATE_ENV = 3, CREATE_SESSION = 7, RUN = 9, CREATE_SESSION_OPTIONS = 10,
  SET_INTRA_OP_NUM_THREADS = 24, SESSION_GET_INPUT_COUNT = 30, SESSION_GET_OUTPUT_COUNT = 31,
  SESSION_GET_INPUT_TYPE_INFO = 33, SESSION_GET_INPUT_NAME = 36, SESSION_GET_OUTPUT_NAME = 37,
  CREATE_TENSOR_AS_ORT_VALUE = 48, GET_TENSOR_MUTABLE_DATA = 51, CAST_TYPE_INFO_TO_TENSOR_INFO = 55,
  GET_TENSOR_ELEMENT_TYPE = 60, GET_DIMENSIONS_COUNT = 61, GET_DIMENSIONS = 62, GET_TENSOR_SHAPE_ELEMENT_COUNT = 64,
  GET_TENSOR_TYPE_AND_SHAPE = 65, GET_ALLOCATOR_WITH_DEFAULT_OPTIONS = 78, RELEASE_VALUE = 96,
};

constexpr uint32_t VERSION = 18;  // an old one: any later library serves it

}  // namespace ort
