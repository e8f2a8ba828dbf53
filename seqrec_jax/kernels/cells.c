// Which history each cell of a batch's rows belongs to.
//
// Called by data/batches.py, which says what the arrays are.

#include "kernel.h"

XLA_FFI_Error *cells(XLA_FFI_CallFrame *frame) {
  if (is_asked(frame)) return NULL;
  XLA_FFI_Buffer **in = (XLA_FFI_Buffer **)frame->args.args, **out = (XLA_FFI_Buffer **)frame->rets.rets;
  const int32_t *row_U = in[0]->data, *column_U = in[1]->data, *length_U = in[2]->data;
  int32_t *segments = out[0]->data, *offsets = out[1]->data, *lengths = out[2]->data;
  long histories = in[0]->dims[0], rows = out[0]->dims[0], width = out[0]->dims[1];
  for (long cell = 0; cell < rows * width; cell++) segments[cell] = offsets[cell] = 0, lengths[cell] = length_U[0];
  for (long u = 0; u < histories; u++)
    for (long offset = 0; offset < length_U[u]; offset++) {
      if (row_U[u] >= rows || column_U[u] + offset >= width) break;
      long cell = row_U[u] * width + column_U[u] + offset;
      segments[cell] = u + 1, offsets[cell] = offset, lengths[cell] = length_U[u];
    }
  return NULL;
}
