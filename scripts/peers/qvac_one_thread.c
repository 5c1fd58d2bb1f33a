// Preloaded into QVAC's engine by tests (tests/qvac_peer.py): every graph is computed by one thread instead of four.
// The engine has no option for it, and its threads wait for each other by spinning: on two busy cores a small network
// then takes minutes. ggml's CPU library calls ggml_graph_plan through its symbol table, so this one is called first and
// passes everything on but the number of threads. The answers are the same bits.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <string.h>

struct plan { void *fields[6]; };  // ggml_cplan: returned in the caller's memory, never looked into here
typedef struct plan (*make_plan)(const void *graph, int threads, void *pool);

static char library[4096];

static int find(struct dl_phdr_info *info, size_t size, void *unused) {
  (void)size, (void)unused;
  if (!info->dlpi_name || !strstr(info->dlpi_name, "libqvac-ggml-cpu-")) return 0;
  strncpy(library, info->dlpi_name, sizeof library - 1);
  return 1;
}

struct plan ggml_graph_plan(const void *graph, int threads, void *pool) {
  static make_plan next;
  (void)threads;
  if (!next) {
    dl_iterate_phdr(find, 0);
    next = (make_plan)dlsym(dlopen(library, RTLD_NOLOAD | RTLD_LAZY), "ggml_graph_plan");
  }
  return next(graph, 1, pool);
}
