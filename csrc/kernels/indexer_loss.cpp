// The indexer's loss: the mean over the queries that count. Interface: dsa/indexer_loss.h.
#include "kernels/indexer_loss_tiles.h"

namespace dsa::DSA_ISA {

int indexer_loss(const dsa_indexer_loss_args& args) {
    const int64_t batch = args.q.size[0], tokens = args.q.size[1], keys = args.k.size[1];
    const int64_t per_pair = args.q.size[2] * args.q.size[3] + 3 * args.q_index.size[2] * args.q_index.size[3];
    const int64_t read = args.indices.data != nullptr ? args.indices.size[2] : keys;
    // Below this, waking another thread costs more than it gives.
    const int threads = batch * tokens * read * per_pair < (1 << 19) ? 1 : args.threads;
    double loss = 0;
    int64_t count = 0;
    const int status = args.indices.data != nullptr ? indexer_loss_selected(args, threads, &loss, &count)
                                                    : indexer_loss_visible(args, threads, &loss, &count);
    const double share = 1.0 / static_cast<double>(larger<int64_t>(count, 1));
    *static_cast<float*>(args.loss.data) = static_cast<float>(loss * share);
    if (args.grad_q.data != nullptr && status == DSA_OK) {
        scale_gradient(args.grad_q, static_cast<float>(share), threads);
        scale_gradient(args.grad_k, static_cast<float>(share), threads);
        scale_gradient(args.grad_w, static_cast<float>(share), threads);
    }
    return status;
}

}  // namespace dsa::DSA_ISA
