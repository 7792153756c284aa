package com.alipay.sofa.rpc.core.response;

/** The answering half of {@link com.alipay.sofa.rpc.core.request.SofaRequest}: raw bytes under the name that peers expect. */
public final class SofaResponse {
    public final byte[] content;

    public SofaResponse(byte[] content) {
        this.content = content;
    }
}
