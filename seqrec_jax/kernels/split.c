// A vector's parts, of 4 bytes an entry, as arrays of their own.
//
// Called by encoders/transformer.py.

#include "kernel.h"

XLA_FFI_Error *split(XLA_FFI_CallFrame *frame) {
  if (is_asked(frame)) return NULL;
  const char *from = ((XLA_FFI_Buffer *)frame->args.args[0])->data;
  for (long part = 0; part < frame->rets.size; part++) {
    XLA_FFI_Buffer *to = frame->rets.rets[part];
    long bytes = 4 * entries_of(to);
    memcpy(to->data, from, bytes);
    from += bytes;
  }
  return NULL;
}
