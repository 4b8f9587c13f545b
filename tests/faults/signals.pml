/* The protocol of csrc/symm_mem/communicator.h, for the model checker Spin: every interleaving of the ranks' steps.
 *
 * Checked in all of them:
 *   no deadlock             every rank comes to its end (Spin reports invalid end states)
 *   no lost update          whoever reads a slot finds what its owner wrote for this call and this chunk
 *   no reuse while read     nobody writes to a slot that somebody reads
 *
 * The calls take turns: one_shot (all_reduce of little), exchange (all_gather, reduce_scatter, all_to_all), two_shot
 * (all_reduce of much), in_place (all_reduce of tensors in the arena: each rank writes its part of the sum into all
 * tensors). Memory is sequentially consistent here; that each publish and wait is a release and an acquire is
 * ThreadSanitizer's to check.
 *
 * Built with one of BUG_1 to BUG_6 the model lacks one of the protocol's precautions, and Spin must find the fault.
 */
#ifndef RANKS
#define RANKS 2
#endif
#ifndef CALLS
#define CALLS 5
#endif
#define CHUNKS 4

/* Signals: only their owner raises them. */
byte arrived[RANKS];
byte progress[RANKS];

/* What lies in each memory, as the call (and chunk) that it was written for, and how many read it just now. */
#define SLOT(rank, parity) ((rank) * 2 + (parity))
byte arrival_slot[RANKS * 2], arrival_readers[RANKS * 2];
byte chunk_slot[RANKS * 2], chunk_readers[RANKS * 2];
byte sum_slot[RANKS * 2], sum_readers[RANKS * 2];
/* in_place: tensor[owner * RANKS + part], where part r is rank r's to sum. */
byte tensor[RANKS * RANKS], tensor_readers[RANKS * RANKS];

#define WRITE(memory, readers, index, value) \
  atomic { assert(readers[index] == 0); memory[index] = value }
#define READ(memory, readers, index, value) \
  readers[index]++; assert(memory[index] == value); readers[index]--

#define TAG(call, chunk) ((call) * 8 + (chunk))

#ifdef BUG_1 /* one arrival slot instead of two by the call's parity */
#define PARITY(call) 0
#else
#define PARITY(call) ((call) & 1)
#endif

#define AWAIT_ALL(signal, target) \
  k = 0; \
  do \
  :: k < RANKS -> signal[k] >= (target); k++ \
  :: else -> break \
  od

inline publish_arrival() { arrived[me] = call }

inline one_shot() {
#ifdef BUG_2 /* the signal before the data */
  publish_arrival();
  WRITE(arrival_slot, arrival_readers, SLOT(me, PARITY(call)), TAG(call, 0));
#else
  WRITE(arrival_slot, arrival_readers, SLOT(me, PARITY(call)), TAG(call, 0));
  publish_arrival();
#endif
  AWAIT_ALL(arrived, call);
  peer = 0;
  do
  :: peer < RANKS ->
    READ(arrival_slot, arrival_readers, SLOT(peer, PARITY(call)), TAG(call, 0));
    peer++
  :: else -> break
  od
}

/* Steps of a rank, in its order: input(1), released(0), input(2), released(1), ... */
#define E_INPUT(c) (base + 2 * (c) - 1)
#define E_RELEASED(c) (base + 2 * (c) + 2)

inline exchange() {
  WRITE(arrival_slot, arrival_readers, SLOT(me, PARITY(call)), TAG(call, 0));
  publish_arrival();
  AWAIT_ALL(arrived, call);
  c = 1;
  do
  :: c <= CHUNKS ->
    if
    :: c < CHUNKS ->
#ifndef BUG_3 /* a chunk's slot is written again without waiting for its readers */
      if
      :: c > 2 -> AWAIT_ALL(progress, E_RELEASED(c - 2))
      :: else
      fi;
#endif
      WRITE(chunk_slot, chunk_readers, SLOT(me, c & 1), TAG(call, c));
      progress[me] = E_INPUT(c)
    :: else
    fi;
    peer = 0;
    do
    :: peer < RANKS ->
      if
      :: c == 1 -> READ(arrival_slot, arrival_readers, SLOT(peer, PARITY(call)), TAG(call, 0))
      :: else ->
        progress[peer] >= E_INPUT(c - 1);
        READ(chunk_slot, chunk_readers, SLOT(peer, (c - 1) & 1), TAG(call, c - 1))
      fi;
      peer++
    :: else -> break
    od;
    progress[me] = E_RELEASED(c - 1);
    c++
  :: else -> break
  od;
  base = E_RELEASED(CHUNKS - 1)
}

/* Steps of a rank, in its order: input(0), reduced(0), input(1), reduced(1), released(0), input(2), ... */
#define T_INPUT(c) (base + 3 * (c) + 1)
#define T_REDUCED(c) (base + 3 * (c) + 2)
#define T_RELEASED(c) (base + 3 * (c) + 6)

inline two_shot() {
  publish_arrival();
#ifndef BUG_4 /* chunk slots are written before everybody has left the call before */
  AWAIT_ALL(arrived, call);
#endif
  c = 0;
  do
  :: c <= CHUNKS ->
    if
    :: c < CHUNKS ->
      if
      :: c >= 2 -> AWAIT_ALL(progress, T_RELEASED(c - 2))
      :: else
      fi;
      WRITE(chunk_slot, chunk_readers, SLOT(me, c & 1), TAG(call, c));
      progress[me] = T_INPUT(c);
      AWAIT_ALL(progress, T_INPUT(c));
      peer = 0;
      do
      :: peer < RANKS ->
        READ(chunk_slot, chunk_readers, SLOT(peer, c & 1), TAG(call, c));
        peer++
      :: else -> break
      od;
      WRITE(sum_slot, sum_readers, SLOT(me, c & 1), TAG(call, c));
      progress[me] = T_REDUCED(c)
    :: else
    fi;
    if
    :: c > 0 ->
      peer = 0;
      do
      :: peer < RANKS ->
        progress[peer] >= T_REDUCED(c - 1);
        READ(sum_slot, sum_readers, SLOT(peer, (c - 1) & 1), TAG(call, c - 1));
        peer++
      :: else -> break
      od;
#ifndef BUG_6 /* nobody says that it has read the sums */
      progress[me] = T_RELEASED(c - 1)
#endif
    :: else
    fi;
    c++
  :: else -> break
  od;
  base = T_RELEASED(CHUNKS - 1)
}

/* Every rank fills its tensor before it comes, sums its part of all tensors, and writes the sum into that part of all. */
inline in_place() {
  peer = 0;
  do
  :: peer < RANKS ->
    WRITE(tensor, tensor_readers, me * RANKS + peer, TAG(call, 0));
    peer++
  :: else -> break
  od;
  publish_arrival();
  AWAIT_ALL(arrived, call);
  peer = 0;
  do
  :: peer < RANKS ->
    READ(tensor, tensor_readers, peer * RANKS + me, TAG(call, 0));
    peer++
  :: else -> break
  od;
  peer = 0;
  do
  :: peer < RANKS ->
    WRITE(tensor, tensor_readers, peer * RANKS + me, TAG(call, 1));
    peer++
  :: else -> break
  od;
  progress[me] = base + 1;
#ifndef BUG_5 /* the tensor is used before the others have written their parts */
  AWAIT_ALL(progress, base + 1);
#endif
  base = base + 1;
  peer = 0;
  do
  :: peer < RANKS ->
    READ(tensor, tensor_readers, me * RANKS + peer, TAG(call, 1));
    peer++
  :: else -> break
  od
}

active [RANKS] proctype rank() {
  byte me = _pid;
  byte call = 1;
  byte base = 0;
  byte c, k, peer;
  do
  :: call <= CALLS ->
    if
    :: call % 5 == 1 -> one_shot()
    :: call % 5 == 2 -> exchange()
    :: call % 5 == 3 -> two_shot()
    :: call % 5 == 4 -> in_place()
    :: call % 5 == 0 -> one_shot()
    fi;
    call++
  :: else -> break
  od
}
