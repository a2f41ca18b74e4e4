// Which sources a library is built of, to be found in its bytes before it is loaded: ras_fast/backend.py refuses one that was
// left from an earlier version, whose kernels may read their arguments otherwise.
namespace {
[[gnu::used]] const char kSources[] = RAS_FAST_SOURCES;
}
