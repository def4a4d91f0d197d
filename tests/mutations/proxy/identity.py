"""Guards of ``proxy/identity/``."""

from tests.mutations.mutation import Mutation

MUTATIONS = (
    Mutation(
        "failures of an address are counted together",
        "proxy/identity/authenticate.py",
        "    await identity.failures.count(_network_of(request, identity))\n",
        "",
        "tests/proxy/account/test_keys.py",
    ),
    Mutation(
        "nobody to the operator's endpoints without the token",
        "proxy/identity/authenticate.py",
        'return scheme.lower() == "bearer" and same',
        'return scheme.lower() == "bearer"',
        "tests/proxy/operator/test_admin.py",
    ),
    Mutation(
        "a key pays from its own wallet",
        "proxy/identity/authenticate.py",
        "    if wallet_id not in (None, caller.wallet_id):",
        "    if False:",
        "tests/proxy/identity/test_sign_ins.py",
    ),
    Mutation(
        "a JWT's algorithm is its key's",
        "proxy/identity/jwt.py",
        "algorithms=[key.alg],",
        'algorithms=["HS256", "RS256", "ES256"],',
        "tests/unit/identity/test_jwt.py",
    ),
    Mutation(
        "a JWT's secret is for HS256 alone",
        "proxy/identity/jwt.py",
        'if token.alg == "HS256" and self._secret is not None:',
        'if token.alg != "RS256" and self._secret is not None:',
        "tests/unit/identity/test_jwt.py",
    ),
    Mutation(
        "a JWT's signature is checked",
        "proxy/identity/jwt.py",
        "                options=self._options,\n",
        '                options={**self._options, "verify_signature": False},\n',
        "tests/unit/identity/test_jwt.py",
    ),
    Mutation(
        "a JWT is for our audience",
        "proxy/identity/jwt.py",
        '"verify_aud": bool(settings.audience),',
        '"verify_aud": False,',
        "tests/unit/identity/test_jwt_claims.py",
    ),
    Mutation(
        "a JWT is our issuer's",
        "proxy/identity/jwt.py",
        "                issuer=self._settings.issuer or None,\n",
        "",
        "tests/unit/identity/test_jwt_claims.py",
    ),
    Mutation(
        "a JWT expires",
        "proxy/identity/jwt.py",
        "if expires_s is None or now_s >= expires_s + settings.leeway_s:",
        "if expires_s is None:",
        "tests/unit/identity/test_jwt_claims.py",
    ),
    Mutation(
        "a JWT says when it expires",
        "proxy/identity/jwt.py",
        "    if expires_s is None or now_s >= expires_s + settings.leeway_s:\n",
        "    expires_s = expires_s or int(now_s) + 60\n    if now_s >= expires_s + settings.leeway_s:\n",
        "tests/unit/identity/test_jwt_claims.py",
    ),
    Mutation(
        "a JWT's times are numbers",
        "proxy/identity/jwt.py",
        "if isinstance(value, bool) or not isinstance",
        "if not isinstance",
        "tests/unit/identity/test_jwt_claims.py",
    ),
    Mutation(
        "a JWT's critical extensions are refused",
        "proxy/identity/jwt.py",
        '("crit", "jku",',
        '("jku",',
        "tests/unit/identity/test_jwt.py",
    ),
    Mutation(
        "a JWT of a role is no person's",
        "proxy/identity/jwt.py",
        'if claims.get("role", _PERSON) != _PERSON:',
        'if claims.get("role", _PERSON) == "anon":',
        "tests/unit/identity/test_jwt_claims.py",
    ),
    Mutation(
        "a JWT names a claim once",
        "proxy/identity/jwt.py",
        "if len(found) != len(pairs):",
        "if not found and pairs:",
        "tests/unit/identity/test_jwt_claims.py",
    ),
    Mutation(
        "a JWT has one spelling",
        "proxy/identity/jwt.py",
        r"\.[\w-]+",
        r"\.[\w=-]+",
        "tests/unit/identity/test_jwt_spelling.py",
    ),
    Mutation(
        "a JWT seen a moment ago is dropped with its key",
        "proxy/identity/jwt.py",
        "if current and self._monotonic()",
        "if self._monotonic()",
        "tests/unit/identity/test_jwks_fetch.py",
    ),
    Mutation(
        "a JWT seen a moment ago expires",
        "proxy/identity/jwt.py",
        " and self._clock() < found.expires_s:",
        ":",
        "tests/unit/identity/test_jwt.py",
    ),
    Mutation(
        "a JWT's key is no published secret",
        "proxy/identity/jwks.py",
        'if jwk.get("kty") not in ("RSA", "EC") or _PRIVATE_MEMBERS & jwk.keys():',
        'if jwk.get("kty") not in ("RSA", "EC"):',
        "tests/unit/identity/test_jwks_keys.py",
    ),
    Mutation(
        "a JWT's key is not symmetric",
        "proxy/identity/jwks.py",
        '    if jwk.get("kty") not in ("RSA", "EC") or _PRIVATE_MEMBERS & jwk.keys():\n'
        '        raise ValueError("not a public key")  # a secret that everybody can read proves nothing\n'
        '    key = _parse_rsa(jwk) if jwk["kty"] == "RSA" else _parse_ec(jwk)\n',
        '    if jwk.get("kty") == "oct":\n'
        "        from jwt.algorithms import HMACAlgorithm\n"
        "\n"
        "        return kid, VerifyingKey(\n"
        '            "HS256", HMACAlgorithm.from_jwk(jwk), HMACAlgorithm(HMACAlgorithm.SHA256)\n'
        "        )\n"
        '    key = _parse_rsa(jwk) if jwk["kty"] == "RSA" else _parse_ec(jwk)\n',
        "tests/unit/identity/test_jwks_keys.py",
    ),
    Mutation(
        "a JWT's key is strong",
        "proxy/identity/jwks.py",
        "_RSA_BITS_MIN = 2048",
        "_RSA_BITS_MIN = 1024",
        "tests/unit/identity/test_jwks_keys.py",
    ),
    Mutation(
        "a JWT's key is of the one curve",
        "proxy/identity/jwks.py",
        'if jwk.get("crv") != "P-256":',
        'if jwk.get("crv") == "P-521":',
        "tests/unit/identity/test_jwks_keys.py",
    ),
    Mutation(
        "a JWT's key has a name of its own",
        "proxy/identity/jwks.py",
        "return {kid: key for kid, key in found if times[kid] == 1}",
        "return dict(found)",
        "tests/unit/identity/test_jwks_keys.py",
    ),
    Mutation(
        "JWT keys are fetched once per window",
        "proxy/identity/jwks.py",
        "        if self._wait_s() > 0:\n            return None\n",
        "",
        "tests/unit/identity/test_jwks_fetch.py",
    ),
    Mutation(
        "JWT keys are fetched by one",
        "proxy/identity/jwks.py",
        "if self._fetching is not None and not self._fetching.done():",
        "if False:",
        "tests/unit/identity/test_jwks_fetch.py",
    ),
    Mutation(
        "JWT keys grow stale",
        "proxy/identity/jwks.py",
        "return self._keys.get(kid) if self._age_s() <= self._settings.jwks_stale_s else None",
        "return self._keys.get(kid)",
        "tests/unit/identity/test_jwks_fetch.py",
    ),
)
