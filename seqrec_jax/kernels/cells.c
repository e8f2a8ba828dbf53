// Which history each cell of a batch's rows belongs to.
//
// Called by data/batches.py, which says what the arrays are. Histories are sorted by row and column.

#include "kernel.h"

XLA_FFI_Error *cells(XLA_FFI_CallFrame *frame) {
  if (is_asked(frame)) return NULL;
  XLA_FFI_Buffer **in = (XLA_FFI_Buffer **)frame->args.args, **out = (XLA_FFI_Buffer **)frame->rets.rets;
  const int32_t *row_U = in[0]->data, *column_U = in[1]->data, *length_U = in[2]->data;
  int32_t *segments = out[0]->data, *offsets = out[1]->data, *lengths = out[2]->data;
  long histories = in[0]->dims[0], rows = out[0]->dims[0], width = out[0]->dims[1];
  for (long row = 0, next = 0; row < rows; row++)
    for (long column = 0, owner = -1; column < width; column++) {
      for (; next < histories && (length_U[next] == 0 || row_U[next] < row); next++);
      if (next < histories && row_U[next] == row && column_U[next] == column) owner = next++;
      long cell = row * width + column, offset = owner < 0 ? 0 : column - column_U[owner];
      bool inside = owner >= 0 && offset < length_U[owner];
      segments[cell] = inside ? owner + 1 : 0;
      offsets[cell] = inside ? offset : 0;
      lengths[cell] = length_U[owner < 0 ? 0 : owner];
    }
  return NULL;
}
