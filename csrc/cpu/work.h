// A list of tensors as one row of work: the threads share it out by cost, wherever one tensor ends
// and the next begins.
#pragma once

#include "cpu/pages.h"
#include "cpu/parallel.h"

namespace qk::cpu::QK_ISA {

// What is to be done for one tensor, in one phase or several. Results must not depend on how the
// items of a phase are cut into runs.
class Work {
 public:
  virtual ~Work() = default;

  // Items [begin, end) of the present phase; several threads call it at once.
  virtual void run(int64_t begin, int64_t end) = 0;

  // Called once when all items of a phase are done: ends it, and says whether another follows.
  virtual bool next() { return false; }

  int64_t items = 0;     // of the present phase
  int64_t cost = 1;      // of one item, in elements of a plain pass
  bool invalid = false;  // whether a given scale or zero point is
};

// Works one after the other, in the phases of one.
class Chain : public Work {
 public:
  ~Chain() override { delete link; }
  Chain() = default;
  Chain(const Chain&) = delete;
  Chain& operator=(const Chain&) = delete;

  void run(int64_t begin, int64_t end) override { link->run(begin, end); }

  bool next() override {
    if (!link->next()) {
      delete link;
      link = nullptr;
      link = following();
    }
    return follow();
  }

 protected:
  // The work that comes after those that are done, or null.
  virtual Work* following() = 0;

  bool follow() {
    items = link ? link->items : 0;
    cost = link ? link->cost : 1;
    return link != nullptr;
  }

  Work* link = nullptr;
};

// The works of a list of calls; owns them.
class WorkList {
 public:
  explicit WorkList(int64_t capacity) : more(capacity > 1 ? capacity : 0) {
    if (capacity > 1) works = more.data;
  }
  ~WorkList() {
    for (int64_t i = 0; i < count; ++i) delete works[i];
  }
  WorkList(const WorkList&) = delete;
  WorkList& operator=(const WorkList&) = delete;

  void add(Work* work) { works[count++] = work; }

  // All phases; those of the same number run together, in one parallel region.
  void run(int threads) {
    while (count > 0) {
      run_phase(threads);
      int64_t left = 0;
      for (int64_t i = 0; i < count; ++i) {
        Work* work = works[i];
        works[i] = nullptr;
        if (work->next())
          works[left++] = work;
        else
          delete work;
      }
      count = left;
    }
  }

 private:
  void run_phase(int threads) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += works[i]->items * works[i]->cost;
    const int useful = threads_for(total, threads);
    parallel_for(useful, useful,
                 [&](int64_t t) { run_share(total * t / useful, total * (t + 1) / useful); });
  }

  // The items that begin in [begin, end) of the row.
  void run_share(int64_t begin, int64_t end) {
    for (int64_t i = 0; i < count && end > 0; ++i) {
      Work& work = *works[i];
      const int64_t first = first_from(work, begin), last = first_from(work, end);
      if (first < last) work.run(first, last);
      begin -= work.items * work.cost;
      end -= work.items * work.cost;
    }
  }

  static int64_t first_from(const Work& work, int64_t position) {
    if (position <= 0 || work.items == 0) return 0;
    const int64_t item = (position + work.cost - 1) / work.cost;
    return item < work.items ? item : work.items;
  }

  Buffer<Work*> more;
  Work* one;
  Work** works = &one;
  int64_t count = 0;
};

// Runs make(call) of every call; returns the index of the first invalid one, or -1. With
// only_valid nothing runs if there is one.
template <class P, class F>
int64_t run_list(const P* calls, int64_t count, int threads, F make, bool only_valid = false) {
  WorkList works(count);
  int64_t bad = -1;
  for (int64_t i = 0; i < count; ++i) {
    Work* work = make(calls[i]);
    works.add(work);
    if (work->invalid && bad < 0) bad = i;
  }
  if (bad < 0 || !only_valid) works.run(threads);
  return bad;
}

// The elements of a list that each thread gets; numel(call) counts those of one call.
template <class P, class F>
int64_t thread_share(const P* calls, int64_t count, int threads, F numel) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += numel(calls[i]);
  return total / threads_for(total, threads);
}

}  // namespace qk::cpu::QK_ISA
